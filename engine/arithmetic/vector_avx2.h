/* vector_avx2.h - the vocabulary of kernel_body.h for AVX2 with FMA: 8 lanes, 16 registers. */
#define V __m256
#define W __m256i
#define VLEN 8
#define V_LOAD(p) _mm256_loadu_ps(p)
#define V_STORE(p, v) _mm256_storeu_ps(p, v)
#define V_STREAM(p, v) _mm256_stream_ps(p, v)
#define V_STREAMED() _mm_sfence()
#define V_LOAD_BF16(p)                                                                                       \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
#define V_STORE_BF16(p, v) avx2_store_bf16(p, v)
#define V_SET(x) _mm256_set1_ps(x)
#define V_ADD(a, b) _mm256_add_ps(a, b)
#define V_SUB(a, b) _mm256_sub_ps(a, b)
#define V_MUL(a, b) _mm256_mul_ps(a, b)
#define V_DIV(a, b) _mm256_div_ps(a, b)
#define V_FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define V_MAX(a, b) _mm256_max_ps(a, b)
#define V_MIN(a, b) _mm256_min_ps(a, b)
#define V_ROUND(x) _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define V_POW2(n)                                                                                            \
    _mm256_castsi256_ps(                                                                                     \
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23))
#define V_HMAX(v) avx2_highest(v)
#define W_LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define W_STORE(p, w) _mm256_storeu_si256((__m256i *)(p), w)
#define W_TRANSPOSE(block) transpose_8x8(block)
#define W_KEEP(w) ((void)0)
#define W_SET(x) _mm256_set1_epi32((int)(x))
#define W_AND(a, b) _mm256_and_si256(a, b)
#define W_MAX(a, b) _mm256_max_epi32(a, b)
#define W_FLOAT(w) _mm256_cvtepi32_ps(w)

/* maddubs wants its first factor unsigned: |a| and b with a's sign; 127 * 127 * 2 does not saturate. */
#define DOT_INT8(sum, a, b)                                                                                  \
    _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_set1_epi16(1),                                            \
                                            _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a))))
