// test_rules.cpp - what ggml's CUDA backend of the pinned tree has no kernel for
//
// Of the operations that a budgeted cache brings into a graph, as ggml-cuda.cu and fattn.cu say it; with
// tensor cores of Turing or later. Of all others: what the CPU computes.
#include "test_device.h"

static bool is_plain(ggml_type t) {
    return t == GGML_TYPE_F32 || t == GGML_TYPE_F16 || t == GGML_TYPE_BF16;
}

static bool is_legacy_quant(ggml_type t) {
    return t == GGML_TYPE_Q4_0 || t == GGML_TYPE_Q4_1 || t == GGML_TYPE_Q5_0 ||
           t == GGML_TYPE_Q5_1 || t == GGML_TYPE_Q8_0;
}

static bool attends(const ggml_tensor * op) {
    const ggml_tensor * q    = op->src[0];
    const ggml_tensor * k    = op->src[1];
    const ggml_tensor * v    = op->src[2];
    const ggml_tensor * mask = op->src[3];
    for (const ggml_type type : { k->type, v->type }) {
        if (!is_plain(type) && !is_legacy_quant(type)) {
            return false;
        }
    }
    if (mask != nullptr && mask->ne[2] != 1) {
        return false;
    }
    switch (k->ne[0]) {
        case 40:
        case 64:
        case 72:
        case 80:
        case 96:
        case 112:
        case 128:
        case 256: return v->ne[0] == k->ne[0];
        // only with heads in groups, and spans of whole blocks
        case 192: return v->ne[0] == 128 && k->ne[1] % 256 == 0 && q->ne[2] / k->ne[2] % 8 == 0;
        case 512: return v->ne[0] == 512 && k->ne[1] % 256 == 0 && q->ne[2] / k->ne[2] >= 2;
        case 576: return v->ne[0] == 512 && k->ne[1] % 256 == 0 && q->ne[2] / k->ne[2] >= 2;
        default: return false;
    }
}

static bool copies(const ggml_tensor * src, const ggml_tensor * dst) {
    if (is_plain(src->type) && is_plain(dst->type)) {
        return true;
    }
    if (src->type == GGML_TYPE_F32) {
        return is_legacy_quant(dst->type) || dst->type == GGML_TYPE_IQ4_NL ||
               dst->type == GGML_TYPE_I32;
    }
    if (dst->type == GGML_TYPE_F32) {
        return is_legacy_quant(src->type) || src->type == GGML_TYPE_I32;
    }
    return (src->type == GGML_TYPE_I32 && dst->type == GGML_TYPE_I32) ||
           (src->type == dst->type && ggml_is_contiguous(src) && ggml_is_contiguous(dst));
}

bool test_cuda_supports(const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_FLASH_ATTN_EXT: return attends(op);
        case GGML_OP_CPY: return copies(op->src[0], op->src[1]);
        case GGML_OP_GET_ROWS:
            return is_plain(op->src[0]->type) || is_legacy_quant(op->src[0]->type) ||
                   op->src[0]->type == GGML_TYPE_I32;
        case GGML_OP_SET_ROWS:
            return (op->src[0]->type == GGML_TYPE_F32 &&
                    (is_plain(op->type) || is_legacy_quant(op->type) ||
                     op->type == GGML_TYPE_IQ4_NL)) ||
                   (op->src[0]->type == GGML_TYPE_F16 && op->type == GGML_TYPE_F16);
        case GGML_OP_MUL_MAT:
            return op->src[0]->nb[0] == ggml_element_size(op->src[0]) &&
                   op->src[1]->nb[0] == ggml_element_size(op->src[1]) &&
                   (op->src[1]->type != GGML_TYPE_F16 || op->src[0]->type == GGML_TYPE_F16);
        case GGML_OP_REPEAT:
            return op->src[0]->type == GGML_TYPE_F32 || op->src[0]->type == GGML_TYPE_F16;
        case GGML_OP_CONCAT:
            return op->src[0]->type == op->type && op->src[1]->type == op->type &&
                   !ggml_is_quantized(op->type);
        case GGML_OP_NORM:
        case GGML_OP_RMS_NORM:
        case GGML_OP_L2_NORM: return ggml_is_contiguous_rows(op->src[0]);
        case GGML_OP_SUM_ROWS:
            return op->src[0]->type == GGML_TYPE_F32 && ggml_is_contiguous_rows(op->src[0]);
        case GGML_OP_SCALE: return op->src[0]->type == GGML_TYPE_F32 && op->type == GGML_TYPE_F32;
        case GGML_OP_ADD:
        case GGML_OP_SUB:
        case GGML_OP_MUL:
        case GGML_OP_DIV:
            for (const ggml_type type : { op->src[0]->type, op->src[1]->type, op->type }) {
                if (type != GGML_TYPE_F32 && type != GGML_TYPE_F16) {
                    return false;
                }
            }
            return true;
        case GGML_OP_ROPE:
            return op->src[0]->nb[0] == ggml_type_size(op->src[0]->type) &&
                   ggml_is_contiguous_2(op->src[0]);
        case GGML_OP_SSM_CONV: return op->src[0]->ne[1] % 128 == 0;
        default: return true;
    }
}
