/* vector_avx512.h - the vocabulary of kernel_body.h for AVX-512: 16 lanes, 32 registers. With AVX512_VNNI
 * the dot product of bytes is an instruction. */
#define V __m512
#define W __m512i
#define VLEN 16
#define V_LOAD(p) _mm512_loadu_ps(p)
#define V_STORE(p, v) _mm512_storeu_ps(p, v)
#define V_STREAM(p, v) _mm512_stream_ps(p, v)
#define V_STREAMED() _mm_sfence()
#define V_LOAD_BF16(p)                                                                                       \
    _mm512_castsi512_ps(                                                                                     \
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
#define V_STORE_BF16(p, v) avx512_store_bf16(p, v)
#define V_SET(x) _mm512_set1_ps(x)
#define V_ADD(a, b) _mm512_add_ps(a, b)
#define V_SUB(a, b) _mm512_sub_ps(a, b)
#define V_MUL(a, b) _mm512_mul_ps(a, b)
#define V_DIV(a, b) _mm512_div_ps(a, b)
#define V_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define V_MAX(a, b) _mm512_max_ps(a, b)
#define V_MIN(a, b) _mm512_min_ps(a, b)
#define V_ROUND(x) _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define V_POW2(n)                                                                                            \
    _mm512_castsi512_ps(                                                                                     \
        _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23))
#define V_HMAX(v) _mm512_reduce_max_ps(v)
#define W_LOAD(p) _mm512_loadu_si512(p)
#define W_STORE(p, w) _mm512_storeu_si512(p, w)
#define W_TRANSPOSE(block) transpose_16x16(block)
/* gcc 12 would write each sum of bytes to memory in every round of the loop before. */
#define W_KEEP(w) __asm__("" : "+v"(w))
#define W_SET(x) _mm512_set1_epi32((int)(x))
#define W_AND(a, b) _mm512_and_si512(a, b)
#define W_MAX(a, b) _mm512_max_epi32(a, b)
#define W_FLOAT(w) _mm512_cvtepi32_ps(w)

#ifdef AVX512_VNNI
#define DOT_INT8(sum, a, b) _mm512_dpbusd_epi32(sum, a, b)
#else
#define DOT_INT8(sum, a, b)                                                                                  \
    _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_set1_epi16(1),                                            \
                                            _mm512_maddubs_epi16(_mm512_abs_epi8(a), avx512_sign(b, a))))
#endif
