/* vector_neon.h - the vocabulary of kernel_body.h for NEON: 4 lanes, 32 registers. With NEON_DOTPROD the dot
 * product of bytes is an instruction (FEAT_DotProd). */
#define V float32x4_t
#define W uint32x4_t
#define VLEN 4
#define V_LOAD(p) vld1q_f32(p)
#define V_STORE(p, v) vst1q_f32(p, v)
#define V_STREAM(p, v) V_STORE(p, v)
#define V_STREAMED() ((void)0)
#define V_LOAD_BF16(p) vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))
#define V_STORE_BF16(p, v) neon_store_bf16(p, v)
#define V_SET(x) vdupq_n_f32(x)
#define V_ADD(a, b) vaddq_f32(a, b)
#define V_SUB(a, b) vsubq_f32(a, b)
#define V_MUL(a, b) vmulq_f32(a, b)
#define V_DIV(a, b) vdivq_f32(a, b)
#define V_FMA(a, b, c) vfmaq_f32(c, a, b)
#define V_MAX(a, b) vmaxq_f32(a, b)
#define V_MIN(a, b) vminq_f32(a, b)
#define V_ROUND(x) vrndnq_f32(x)
#define V_POW2(n) vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23))
#define V_HMAX(v) vmaxvq_f32(v)
#define W_LOAD(p) vld1q_u32((const uint32_t *)(p))
#define W_STORE(p, w) vst1q_u32((uint32_t *)(p), w)
#define W_TRANSPOSE(block) transpose_4x4(block)
#define W_KEEP(w) ((void)0)
#define W_SET(x) vdupq_n_u32(x)
#define W_AND(a, b) vandq_u32(a, b)
#define W_MAX(a, b) vmaxq_u32(a, b)
#define W_FLOAT(w) vcvtq_f32_s32(vreinterpretq_s32_u32(w))

#define BYTES(w) vreinterpretq_s8_u32(w)
#ifdef NEON_DOTPROD
#define DOT_INT8(sum, a, b)                                                                                  \
    vreinterpretq_u32_s32(vdotq_s32(vreinterpretq_s32_u32(sum), BYTES(a), BYTES(b)))
#else
#define DOT_INT8(sum, a, b) neon_dot_int8(sum, BYTES(a), BYTES(b))
#endif
