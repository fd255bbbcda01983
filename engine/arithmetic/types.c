/* types.c - the arithmetic that multiplies, by name; the types of weights. */
#include "engine/engine.h"

/* ---------------------------------------------------------------- precisions */

static const char *const precision_names[PRECISIONS] = {"f32", "bf16", "int8"};

const char *precision_name(Precision precision) { return precision_names[precision]; }

bool precision_parse(const char *name, Precision *out) {
    for (int p = 0; p < PRECISIONS; p++)
        if (!strcmp(name, precision_names[p])) {
            *out = (Precision)p;
            return true;
        }
    return false;
}

Precision precision_of_floats(Precision precision) { return precision == F32 ? F32 : BF16; }

/* ---------------------------------------------------------------- the types of weights */

/* Every type of ggml.h by its number. One without widen() is known to --info by name, and no product reads it. */
static const WeightType types[] = {
    [TYPE_F32] = {"f32", 1, 4, widen_f32, F32},
    [TYPE_F16] = {"f16", 1, 2, widen_f16, BF16},
    [2] = {"q4_0", 32, 18, widen_q4_0, INT8},
    [3] = {"q4_1", 32, 20, widen_q4_1, INT8},
    [6] = {"q5_0", 32, 22, widen_q5_0, INT8},
    [7] = {"q5_1", 32, 24, widen_q5_1, INT8},
    [TYPE_Q8_0] = {"q8_0", 32, 34, widen_q8_0, INT8},
    [9] = {"q8_1", 32, 36, NULL, INT8},
    [10] = {"q2_k", 256, 84, widen_q2_k, INT8},
    [11] = {"q3_k", 256, 110, widen_q3_k, INT8},
    [12] = {"q4_k", 256, 144, widen_q4_k, INT8},
    [13] = {"q5_k", 256, 176, widen_q5_k, INT8},
    [14] = {"q6_k", 256, 210, widen_q6_k, INT8},
    [15] = {"q8_k", 256, 292, NULL, INT8},
    [16] = {"iq2_xxs", 256, 66, NULL, INT8},
    [17] = {"iq2_xs", 256, 74, NULL, INT8},
    [18] = {"iq3_xxs", 256, 98, NULL, INT8},
    [19] = {"iq1_s", 256, 50, NULL, INT8},
    [20] = {"iq4_nl", 32, 18, NULL, INT8},
    [21] = {"iq3_s", 256, 110, NULL, INT8},
    [22] = {"iq2_s", 256, 82, NULL, INT8},
    [23] = {"iq4_xs", 256, 136, NULL, INT8},
    [24] = {"i8", 1, 1, NULL, F32},
    [25] = {"i16", 1, 2, NULL, F32},
    [26] = {"i32", 1, 4, NULL, F32},
    [27] = {"i64", 1, 8, NULL, F32},
    [28] = {"f64", 1, 8, NULL, F32},
    [29] = {"iq1_m", 256, 56, NULL, INT8},
    [TYPE_BF16] = {"bf16", 1, 2, widen_bf16, BF16},
    [34] = {"tq1_0", 256, 54, NULL, INT8},
    [35] = {"tq2_0", 256, 66, NULL, INT8},
    [39] = {"mxfp4", 32, 17, NULL, INT8},
    [40] = {"nvfp4", 64, 36, NULL, INT8},
    [41] = {"q1_0", 128, 18, NULL, INT8},
};

const WeightType *weight_type(Type type) {
    return (size_t)type < sizeof types / sizeof *types && types[type].name ? &types[type] : NULL;
}

const char *types_read(void) {
    static char names[256];
    if (*names) return names;
    for (Type t = 0, last = TYPE_BF16; t <= last; t++)
        if (types[t].widen)
            snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s",
                     !*names ? "" : t == last ? " or " : ", ", types[t].name);
    return names;
}

size_t type_bytes(Type type, size_t n) { return n / (size_t)types[type].block * (size_t)types[type].bytes; }

void convert_to_floats(float *out, const void *in, Type type, size_t n) { types[type].widen(out, in, n); }

/* Part of a block is widened whole, then cut out. */
void weight_part(const Weight *w, size_t at, int n, float *out) {
    const WeightType *type = &types[w->type];
    size_t block = (size_t)type->block, skip = at % block, count = (size_t)n;
    const char *data = (const char *)w->data + type_bytes(w->type, at);
    if (skip == 0 && count % block == 0) {
        convert_to_floats(out, data, w->type, count);
        return;
    }
    float whole[MAX_BLOCK];
    for (size_t piece; count; out += piece, count -= piece, data += type->bytes, skip = 0) {
        piece = block - skip < count ? block - skip : count;
        convert_to_floats(whole, data, w->type, block);
        memcpy(out, whole + skip, sizeof *out * piece);
    }
}
