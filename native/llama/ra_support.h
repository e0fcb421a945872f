// ra_support.h - which models and cache types can have a budget
#pragma once

#include "config.h"

#include <vector>

struct llama_model;

// RA_STATUS_UNSUPPORTED with the reason, else RA_STATUS_OK; name: "K" or "V", types: ggml_type
ra_status ra_check_type(const char * name, int32_t type, uint32_t head_dim);
ra_status ra_check_model(const llama_model & model, int32_t type_k, int32_t type_v);

// whether the model's layers with a window can have pools (budget_swa)
ra_status ra_check_windows(const llama_model & model);

// whether the policy can work with this model; RA_STATUS_INVALID if its query centres do not fit it
//   grows [>= n_layer]  whether a layer is budgeted
ra_status ra_check_policy(const llama_model & model, const ra_settings & settings,
                          const std::vector<bool> & grows);

// whether the devices that the model was loaded to can hold a budgeted cache
ra_status ra_check_devices(const llama_model & model);
