/* kernel_body.h - the bodies of the kernels, included once per instruction set by kernels.c.
 *
 * kernels.c defines what this file uses. UNROLL, PREFETCH, PART and DISTANCE are the same for every set; each has
 * its own
 *   ISA_NAME, NAME(x), TARGET, TILE_ROWS, TILE_VECTORS, FAST_INT8, BYTE_OFFSET,
 *   TILE_BF16, TILE_INT8, ORDER, ENTER, LEAVE, ATTENTION, ATTENTION_MEMORY: only where the tiles are elsewhere (AMX),
 * and its own vocabulary, vector_*.h. That is, for V, vectors of VLEN floats:
 *   V_LOAD V_STORE V_SET V_ADD V_SUB V_MUL V_DIV V_FMA(a,b,c)=a*b+c V_ROUND V_HMAX
 *   V_STREAM: V_STORE past the caches; V_STREAMED(): before another thread may read it
 *   V_MAX(a,b) V_MIN(a,b): NaN if b is NaN; if only a is NaN, b or NaN
 *   V_POW2(n), 2^n of -126 to 127 and 0 of -127
 *   V_LOAD_BF16(p), V_STORE_BF16(p, v): widened; narrowed to nearest even
 * and for W, vectors of VLEN 32-bit words:
 *   W_LOAD W_STORE W_SET W_AND W_MAX (unsigned, below 2^31) W_FLOAT (integers to floats)
 *   W_TRANSPOSE (of VLEN vectors) W_KEEP (leaves a vector as it is, in a register)
 *   DOT_INT8(sum, a, b): integers, four products of bytes
 *   DOT_BF16(sum, a, b): sum + two products of bfloat16, only where that is faster than two of float32
 * Scalar C is the same text with one lane.
 *
 * Why every instruction set gives the same bits: an element of a product is one chain of fused multiply-adds
 * over k in rising order, vectorised across outputs, so the width of a register never changes the order of a
 * sum. Row reductions run in 16 virtual lanes (element i goes to lane i % 16) and end in one fixed tree. What
 * is done element by element is the same formula in every lane, with every rounding written out. */

/* exp(x), about 1 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial for exp(r) (Cephes' expf), times
 * 2^n. Below, where n is -127, it is 0; above it stays at a finite number; NaN passes through. */
static inline TARGET V NAME(v_exp)(V x) {
    x = V_MIN(V_SET(88.3f), V_MAX(V_SET(-88.03f), x));
    V n = V_ROUND(V_MUL(x, V_SET(1.44269504f)));
    V r = V_FMA(n, V_SET(-0.693359375f), x);
    r = V_FMA(n, V_SET(2.12194440e-4f), r);
    V p = V_SET(1.9875691500e-4f);
    p = V_FMA(p, r, V_SET(1.3981999507e-3f));
    p = V_FMA(p, r, V_SET(8.3334519073e-3f));
    p = V_FMA(p, r, V_SET(4.1665795894e-2f));
    p = V_FMA(p, r, V_SET(1.6666665459e-1f));
    p = V_FMA(p, r, V_SET(5.0000001201e-1f));
    p = V_ADD(V_FMA(V_MUL(r, r), p, r), V_SET(1.0f));
    return V_MUL(p, V_POW2(n));
}

/* A tile: TILE_ROWS x TILE_VECTORS registers of sums, which stay where they are while k runs.
 *
 *                      k ->      +----------------+   panel: one line of TILE_VECTORS registers for each k
 *                                |                |
 *        k ->                    +----------------+
 *   row  +--------+--------+     +----------------+
 *   ...  |  span  |  span  |     |  acc           |   TILE_ROWS
 *        |        |        |     |                |
 *        +--------+--------+     +----------------+
 *
 * Each round also fetches a little of what will be multiplied, or packed, next. (A span's end counts as that of a run
 * of rounds.) */
#define FOR_ROWS UNROLL for (int i = 0; i < TILE_ROWS; i++)
#define FOR_VECTORS UNROLL for (int j = 0; j < TILE_VECTORS; j++)
#define FETCH_AHEAD PREFETCH(ahead.at), ahead.at += ahead.bytes
#define FOR_ROUNDS(k, rounds)                                                                                \
    for (int k = 0, stop_; k < (rounds); ahead.at += ahead.skip)                                             \
        for (stop_ = smaller((rounds), k + ahead.run); k < stop_; k++, b += TILE_VECTORS * VLEN)
#define ROW(i) ((const void *)(span->at + (size_t)(i) * span->stride))

static TARGET void NAME(tile_f32)(float *acc, int ld, int mode, const Span *spans, int count, const void *panel,
                                  Ahead ahead) {
    const float *b = panel;
    V sum[TILE_ROWS][TILE_VECTORS];
    if (mode == REPLACE) FOR_ROWS FOR_VECTORS sum[i][j] = V_SET(0.0f);
    else FOR_ROWS FOR_VECTORS sum[i][j] = V_LOAD(acc + (size_t)i * ld + j * VLEN);
    for (const Span *span = spans; span < spans + count; span++) {
        const float *row[TILE_ROWS];
        FOR_ROWS row[i] = ROW(i);
        FOR_ROUNDS(k, span->n) {
            V column[TILE_VECTORS];
            FOR_VECTORS column[j] = V_LOAD(b + j * VLEN);
            FETCH_AHEAD;
            FOR_ROWS {
                V x = V_SET(row[i][k]);
                FOR_VECTORS sum[i][j] = V_FMA(x, column[j], sum[i][j]);
            }
        }
    }
    FOR_ROWS FOR_VECTORS V_STORE(acc + (size_t)i * ld + j * VLEN, sum[i][j]);
}

#ifdef DOT_BF16
/* The same, a pair of k at a time. */
static TARGET void NAME(tile_bf16)(float *acc, int ld, int mode, const Span *spans, int count, const void *panel,
                                   Ahead ahead) {
    const Word *b = panel;
    V sum[TILE_ROWS][TILE_VECTORS];
    if (mode == REPLACE) FOR_ROWS FOR_VECTORS sum[i][j] = V_SET(0.0f);
    else FOR_ROWS FOR_VECTORS sum[i][j] = V_LOAD(acc + (size_t)i * ld + j * VLEN);
    for (const Span *span = spans; span < spans + count; span++) {
        const Word *row[TILE_ROWS];
        FOR_ROWS row[i] = ROW(i);
        FOR_ROUNDS(k, (span->n + 1) / 2) {
            W column[TILE_VECTORS];
            FOR_VECTORS column[j] = W_LOAD(b + j * VLEN);
            FETCH_AHEAD;
            FOR_ROWS {
                W x = W_SET(row[i][k]);
                FOR_VECTORS sum[i][j] = DOT_BF16(sum[i][j], x, column[j]);
            }
        }
    }
    FOR_ROWS FOR_VECTORS V_STORE(acc + (size_t)i * ld + j * VLEN, sum[i][j]);
}
#define TILE_BF16 {NAME(tile_bf16), TILE_ROWS, PART, PART, 2}
#define ORDER PAIRS
#elif !defined(TILE_BF16)
#define TILE_BF16 {NAME(tile_f32), TILE_ROWS, PART, PART, 1}
#define ORDER RISING
#endif

#ifndef TILE_INT8
#define TILE_INT8 {NAME(tile_int8), TILE_ROWS, PART, PART, 4}

/* A chunk's sums are exact integers. Then each takes one step in float32:
 *   acc += sum * (scale of the row * scale of the column)
 * The panel's correction of a column, minus byte_offset times the sum of its bytes, takes the offset of the
 * rows' bytes out again. */
static TARGET void NAME(tile_int8)(float *acc, int ld, int mode, const Span *span, int count, const void *panel,
                                   Ahead ahead) {
    const Word *b = panel;
    (void)count;
    for (int i = 0; mode == REPLACE && i < TILE_ROWS; i++)
        memset(acc + (size_t)i * ld, 0, sizeof *acc * TILE_VECTORS * VLEN);
    for (int n = span->n, done = 0; n > 0; n -= INT8_CHUNK, done += SCALE_BYTES + INT8_CHUNK) {
        const float *scales = (const float *)b;
        const Word *row[TILE_ROWS];
        W sum[TILE_ROWS][TILE_VECTORS], correction[TILE_VECTORS];
        FOR_ROWS row[i] = (const Word *)ROW(i) + (done + SCALE_BYTES) / 4;
        FOR_VECTORS correction[j] = W_LOAD(b + (TILE_VECTORS + j) * VLEN);
        FOR_ROWS FOR_VECTORS sum[i][j] = correction[j];
        b += 2 * TILE_VECTORS * VLEN;
        for (int k = 0; k < (smaller(n, INT8_CHUNK) + 3) / 4; k++, b += TILE_VECTORS * VLEN) {
            W column[TILE_VECTORS];
            FOR_VECTORS column[j] = W_LOAD(b + j * VLEN);
            FETCH_AHEAD;
            FOR_ROWS {
                W x = W_SET(row[i][k]);
                FOR_VECTORS sum[i][j] = DOT_INT8(sum[i][j], x, column[j]);
            }
            FOR_ROWS FOR_VECTORS W_KEEP(sum[i][j]);
        }
#define OUT (acc + (size_t)i * ld + j * VLEN)
#define SCALE V_MUL(V_SET(*(const float *)(row[i] - SCALE_BYTES / 4)), V_LOAD(scales + j * VLEN))
        FOR_ROWS FOR_VECTORS V_STORE(OUT, V_FMA(W_FLOAT(sum[i][j]), SCALE, V_LOAD(OUT)));
#undef OUT
#undef SCALE
    }
}

#endif

static TARGET void NAME(write_sums)(float *y, size_t y_stride, int mode, const float *sums, int rows, int cols,
                                    const float *bias, bool stream) {
    stream = stream && cols % VLEN == 0 && ((size_t)y | y_stride * sizeof *y) % CACHE_LINE == 0;
    for (int i = 0; i < rows; i++, y += y_stride, sums += TILE_VECTORS * VLEN) {
        int j = 0;
        for (; j + VLEN <= cols; j += VLEN) {
            V value = V_LOAD(sums + j);
            if (bias) value = V_ADD(value, V_LOAD(bias + j));
            if (mode == ACCUMULATE) value = V_ADD(V_LOAD(y + j), value);
            if (stream) V_STREAM(y + j, value);
            else V_STORE(y + j, value);
        }
        for (; j < cols; j++) {
            float value = bias ? sums[j] + bias[j] : sums[j];
            y[j] = mode == ACCUMULATE ? y[j] + value : value;
        }
    }
    if (stream) V_STREAMED();
}

static TARGET void NAME(from_f16)(float *y, const uint16_t *x, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] = float_of_f16(x[i]);
}

static TARGET void NAME(from_bf16)(float *y, const uint16_t *x, size_t n) {
    size_t i = 0;
    for (; i + VLEN <= n; i += VLEN) V_STORE(y + i, V_LOAD_BF16(x + i));
    for (; i < n; i++) y[i] = float_of_bf16(x[i]);
}

static TARGET void NAME(to_bf16)(uint16_t *y, const float *x, size_t n) {
    size_t i = 0;
    for (; i + VLEN <= n; i += VLEN) V_STORE_BF16(y + i, V_LOAD(x + i));
    for (; i < n; i++) y[i] = bf16_of(x[i]);
}

/* x * factor to nearest, as bytes plus BYTE_OFFSET; the sum of the bytes without it is returned. */
static TARGET int NAME(to_int8)(uint8_t *y, const float *x, int n, float factor) {
    float rounded[64];
    int sum = 0;
    V f = V_SET(factor);
    for (int i = 0; i < n; i += 64) {
        int count = n - i < 64 ? n - i : 64, j = 0;
        for (; j + VLEN <= count; j += VLEN) V_STORE(rounded + j, V_ROUND(V_MUL(V_LOAD(x + i + j), f)));
        for (; j < count; j++) rounded[j] = rintf(x[i + j] * factor);
        for (j = 0; j < count; j++) {
            y[i + j] = (uint8_t)((int)rounded[j] + BYTE_OFFSET);
            sum += (int)rounded[j];
        }
    }
    return sum;
}

/* The largest magnitude; NaN if there is one. Magnitudes are in the order of their bits, NaN above all. */
static TARGET float NAME(largest)(const float *x, int n) {
    W mask = W_SET(0x7fffffff), m = W_SET(0), other = m; /* two, since each waits for its last */
    Word lanes[VLEN], most = 0;
    int i = 0;
    for (; i + 2 * VLEN <= n; i += 2 * VLEN) {
        m = W_MAX(m, W_AND(mask, W_LOAD((const Word *)x + i)));
        other = W_MAX(other, W_AND(mask, W_LOAD((const Word *)x + i + VLEN)));
    }
    W_STORE(lanes, W_MAX(m, other));
    for (int j = 0; j < VLEN; j++) most = lanes[j] > most ? lanes[j] : most;
    for (; i < n; i++) most = bits_of(fabsf(x[i])) > most ? bits_of(fabsf(x[i])) : most;
    return float_from_bits(most);
}

static TARGET float NAME(quantize)(uint8_t *y, const float *x, int n, int *sum) {
    float largest = NAME(largest)(x, n), factor = 127.0f / largest;
    bool usable = factor > 0 && factor < INFINITY;
    *sum = usable ? NAME(to_int8)(y, x, n, factor) : 0;
    if (!usable) memset(y, BYTE_OFFSET, (size_t)n);
    return largest < INFINITY ? largest / 127.0f : NAN;
}

/* out [n][stride_out] = words of `rows` rows of n, transposed; rows is a multiple of VLEN. The hardware prefetcher does
 * not follow so many rows at once, so the words that come next in each row are prefetched. */
static TARGET void NAME(transpose)(Word *out, size_t stride_out, const Word *in, size_t stride_in, int rows,
                                   int n) {
    for (int j = 0; j < rows; j += VLEN) {
        int k = 0;
        for (; k + VLEN <= n; k += VLEN) {
            W block[VLEN];
            for (int i = 0; i < VLEN; i++) PREFETCH(in + (size_t)(j + i) * stride_in + k + DISTANCE);
            UNROLL for (int i = 0; i < VLEN; i++) block[i] = W_LOAD(in + (size_t)(j + i) * stride_in + k);
            W_TRANSPOSE(block);
            UNROLL for (int i = 0; i < VLEN; i++) W_STORE(out + (size_t)(k + i) * stride_out + j, block[i]);
        }
        for (; k < n; k++)
            for (int i = 0; i < VLEN; i++)
                out[(size_t)k * stride_out + j + i] = in[(size_t)(j + i) * stride_in + k];
    }
}

static TARGET float NAME(softmax_tile)(float *scores, int n, float scale, const float *bias, float maximum,
                                       float *sums, float *rescale) {
    int padded = round_up(n, LANES), whole = n - n % LANES;
    V m = V_SET(maximum), factor = V_SET(scale);
    for (int i = 0; i < whole; i += VLEN) {
        V s = V_MUL(V_LOAD(scores + i), factor);
        V_STORE(scores + i, bias ? V_ADD(s, V_LOAD(bias + i)) : s);
    }
    for (int i = whole; i < n; i++) {
        scores[i] *= scale;
        if (bias) scores[i] += bias[i];
    }
    for (int i = n; i < padded; i++) scores[i] = -INFINITY;
    for (int i = 0; i < padded; i += VLEN) m = V_MAX(m, V_LOAD(scores + i));
    float highest = V_HMAX(m);
    m = V_SET(highest);
    V old = NAME(v_exp)(V_SUB(V_SET(maximum), m));
    for (int lane = 0; lane < LANES; lane += VLEN) {
        V sum = V_MUL(V_LOAD(sums + lane), old);
        for (int i = lane; i < padded; i += LANES) {
            V p = NAME(v_exp)(V_SUB(V_LOAD(scores + i), m));
            V_STORE(scores + i, p);
            sum = V_ADD(sum, p);
        }
        V_STORE(sums + lane, sum);
    }
    float first[VLEN];
    V_STORE(first, old);
    *rescale = first[0];
    return highest;
}

static TARGET float NAME(sum)(const float *x, int n) {
    float lanes[LANES] = {0}, tail[LANES] = {0};
    int whole = n - n % LANES;
    for (int i = whole; i < n; i++) tail[i - whole] = x[i];
    for (int lane = 0; lane < LANES; lane += VLEN) {
        V sum = V_SET(0.0f);
        for (int i = lane; i < whole; i += LANES) sum = V_ADD(sum, V_LOAD(x + i));
        V_STORE(lanes + lane, V_ADD(sum, V_LOAD(tail + lane)));
    }
    return lanes_sum(lanes);
}

static TARGET float NAME(sum_squares)(const float *x, int n, float center) {
    float lanes[LANES] = {0}, tail[LANES];
    int whole = n - n % LANES;
    for (int i = 0; i < LANES; i++) tail[i] = whole + i < n ? x[whole + i] : center;
    V c = V_SET(center);
    for (int lane = 0; lane < LANES; lane += VLEN) {
        V sum = V_SET(0.0f);
        for (int i = lane; i < whole; i += LANES) {
            V d = V_SUB(V_LOAD(x + i), c);
            sum = V_FMA(d, d, sum);
        }
        V d = V_SUB(V_LOAD(tail + lane), c);
        V_STORE(lanes + lane, V_FMA(d, d, sum));
    }
    return lanes_sum(lanes);
}

static TARGET void NAME(rms_norm_row)(float *y, const float *x, int n, const float *gain, float eps) {
    float factor = 1.0f / sqrtf(NAME(sum_squares)(x, n, 0.0f) / (float)n + eps);
    for (int i = 0; i < n; i++) y[i] = x[i] * factor * gain[i];
}

static TARGET void NAME(l2_norm_row)(float *y, const float *x, int n, const float *gain) {
    float norm = sqrtf(NAME(sum_squares)(x, n, 0.0f));
    float factor = sqrtf((float)n) / (norm < 1e-12f ? 1e-12f : norm);
    for (int i = 0; i < n; i++) y[i] = x[i] * factor * gain[i];
}

static TARGET void NAME(layer_norm_row)(float *y, const float *x, int n, float eps, const float *scale,
                                        const float *shift) {
    float mean = NAME(sum)(x, n) / (float)n;
    float factor = 1.0f / sqrtf(NAME(sum_squares)(x, n, mean) / (float)n + eps);
    for (int i = 0; i < n; i++) y[i] = (x[i] - mean) * factor * scale[i] + shift[i];
}

static inline TARGET V NAME(v_silu)(V x) {
    return V_DIV(x, V_ADD(V_SET(1.0f), NAME(v_exp)(V_SUB(V_SET(0.0f), x))));
}

static inline TARGET V NAME(v_gelu)(V x) {
    V cubic = V_FMA(V_MUL(V_MUL(x, x), x), V_SET(0.044715f), x);
    return V_DIV(x, V_ADD(V_SET(1.0f), NAME(v_exp)(V_MUL(cubic, V_SET(-1.59576912f)))));
}

#define ELEMENTWISE(function, formula)                                                                       \
    static TARGET void NAME(function)(float *y, const float *x, size_t n) {                                  \
        size_t i = 0;                                                                                        \
        for (; i + VLEN <= n; i += VLEN) V_STORE(y + i, formula(V_LOAD(x + i)));                             \
        float tail[VLEN] = {0};                                                                              \
        for (size_t j = i; j < n; j++) tail[j - i] = x[j];                                                   \
        V_STORE(tail, formula(V_LOAD(tail)));                                                                \
        for (size_t j = i; j < n; j++) y[j] = tail[j - i];                                                   \
    }
ELEMENTWISE(silu, NAME(v_silu))
ELEMENTWISE(gelu, NAME(v_gelu))
#undef ELEMENTWISE

static TARGET float NAME(multiply_add)(float a, float b, float c) {
    float result[VLEN];
    V_STORE(result, V_ADD(V_MUL(V_SET(a), V_SET(b)), V_SET(c)));
    return result[0];
}

#ifndef ATTENTION
#define ATTENTION attention_in_tiles
#define ATTENTION_MEMORY tiles_attention_memory
#endif

static const Kernels NAME(table) = {
    .name = ISA_NAME,
    .fast = {true, ORDER != RISING, FAST_INT8},
    .product = product_in_panels,
    .attention = ATTENTION,
    .attention_memory = ATTENTION_MEMORY,
    .rms_norm_row = NAME(rms_norm_row),
    .l2_norm_row = NAME(l2_norm_row),
    .layer_norm_row = NAME(layer_norm_row),
    .silu = NAME(silu),
    .gelu = NAME(gelu),
    .from_f16 = NAME(from_f16),
    .from_bf16 = NAME(from_bf16),
    .to_bf16 = NAME(to_bf16),
    .quantize = NAME(quantize),
    .order_of_bf16 = ORDER,
    .byte_offset = BYTE_OFFSET,
    .tile_cols = TILE_VECTORS * VLEN,
    .tile = {{NAME(tile_f32), TILE_ROWS, PART, PART, 1}, TILE_BF16, TILE_INT8},
#ifdef ENTER
    .enter = ENTER,
    .leave = LEAVE,
#endif
    .transpose = NAME(transpose),
    .softmax_tile = NAME(softmax_tile),
    .write_sums = NAME(write_sums),
    .multiply_add = NAME(multiply_add),
};

#undef V
#undef VLEN
#undef TARGET
#undef NAME
#undef ISA_NAME
#undef TILE_ROWS
#undef TILE_VECTORS
#undef V_LOAD
#undef V_STORE
#undef V_STREAM
#undef V_STREAMED
#undef V_SET
#undef V_ADD
#undef V_SUB
#undef V_MUL
#undef V_DIV
#undef V_FMA
#undef V_MAX
#undef V_MIN
#undef V_ROUND
#undef V_POW2
#undef V_HMAX
#undef V_LOAD_BF16
#undef V_STORE_BF16
#undef W
#undef W_LOAD
#undef W_STORE
#undef W_KEEP
#undef W_TRANSPOSE
#undef W_SET
#undef W_AND
#undef W_MAX
#undef W_FLOAT
#undef DOT_BF16
#undef DOT_INT8
#undef TILE_BF16
#undef TILE_INT8
#undef ORDER
#undef ENTER
#undef ATTENTION
#undef ATTENTION_MEMORY
#undef LEAVE
#undef FAST_INT8
#undef BYTE_OFFSET
#undef BYTES
#undef AVX512_VNNI
#undef NEON_DOTPROD
#undef FOR_ROWS
#undef FOR_VECTORS
#undef FETCH_AHEAD
#undef FOR_ROUNDS
#undef ROW
