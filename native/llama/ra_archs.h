// ra_archs.h - which architectures can have a budget
#pragma once

#include "llama-arch.h"

// Why an architecture is refused, as "it ..."; NULL: it is not.
const char * ra_arch_refusal(llm_arch arch);
