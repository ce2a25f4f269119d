/* Layers run plane by plane: for one output channel the weights are unpacked and decoded once, then every tap adds its
   shifted or multiplied plane of inputs to the accumulators, eight taps in one pass. Shifts of negative numbers are
   arithmetic, as gcc and clang define them. */

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3")
#endif

static int32_t acc[LQ_ACC];
static int32_t offsets[2][LQ_TAPS]; /* taps that are added, and with shifters those that are subtracted */
static int16_t factors[2][LQ_TAPS]; /* weights, or places of a shifter */

#define PASS(TYPE, SUM, OP, SIGN)                                                                                  \
    for (; i + 8 <= count; i += 8) {                                                                               \
        const TYPE *p0 = x + o[i], *p1 = x + o[i + 1], *p2 = x + o[i + 2], *p3 = x + o[i + 3];                     \
        const TYPE *p4 = x + o[i + 4], *p5 = x + o[i + 5], *p6 = x + o[i + 6], *p7 = x + o[i + 7];                 \
        const int f0 = f[i], f1 = f[i + 1], f2 = f[i + 2], f3 = f[i + 3];                                          \
        const int f4 = f[i + 4], f5 = f[i + 5], f6 = f[i + 6], f7 = f[i + 7];                                      \
        for (j = 0; j < n; j++)                                                                                    \
            acc[j] SIGN (SUM)((p0[j] OP f0) + (p1[j] OP f1) + (p2[j] OP f2) + (p3[j] OP f3) + (p4[j] OP f4) +      \
                              (p5[j] OP f5) + (p6[j] OP f6) + (p7[j] OP f7));                                      \
    }                                                                                                              \
    for (; i < count; i++)                                                                                         \
        for (j = 0; j < n; j++) acc[j] SIGN (x[o[i] + j] OP f[i]);

#define STRIDED(OP, SIGN)                                                                                          \
    for (; i < count; i++)                                                                                         \
        for (y = 0; y < l->out_height; y++)                                                                        \
            for (j = 0; j < l->out_width; j++)                                                                     \
                acc[y * l->out_width + j] SIGN (x[o[i] + y * l->stride_y * l->in_width + j * l->stride_x] OP f[i]);

#define PLANES(NAME, TYPE)                                                                                         \
    static void NAME(const Layer *l, const TYPE *x, int side, int count, int n) {                                  \
        const int32_t *o = offsets[side];                                                                          \
        const int16_t *f = factors[side];                                                                          \
        int i = 0, j, y;                                                                                           \
        if (l->stride_y != 1 || l->stride_x != 1) {                                                                \
            if (!l->shifters) { STRIDED(*, +=) }                                                                   \
            else if (side) { STRIDED(<<, -=) }                                                                     \
            else { STRIDED(<<, +=) }                                                                               \
        } else if (l->narrow) {                                                                                    \
            if (!l->shifters) { PASS(TYPE, int16_t, *, +=) }                                                       \
            else if (side) { PASS(TYPE, int16_t, <<, -=) }                                                         \
            else { PASS(TYPE, int16_t, <<, +=) }                                                                   \
        } else {                                                                                                   \
            if (!l->shifters) { PASS(TYPE, int32_t, *, +=) }                                                       \
            else if (side) { PASS(TYPE, int32_t, <<, -=) }                                                         \
            else { PASS(TYPE, int32_t, <<, +=) }                                                                   \
        }                                                                                                          \
    }

PLANES(planes_int8, int8_t)
PLANES(planes_uint8, uint8_t)
PLANES(planes_int16, int16_t)

static int code_at(const Layer *l, int32_t index) {
    int32_t bit = index * l->bits;
    unsigned both = l->packed[bit >> 3];
    if ((bit & 7) + l->bits > 8) both |= (unsigned)l->packed[(bit >> 3) + 1] << 8;
    return (int)((both >> (bit & 7)) & ((1u << l->bits) - 1u));
}

static void tap(int side, int *count, int32_t offset, int factor) {
    offsets[side][*count] = offset;
    factors[side][*count] = (int16_t)factor;
    ++*count;
}

static void decode(const Layer *l, int32_t first, int32_t channel, int counts[2]) {
    const int32_t depth = l->inputs / l->groups, plane = l->in_height * l->in_width;
    counts[0] = counts[1] = 0;
    for (int32_t c = 0; c < depth; c++)
        for (int32_t y = 0; y < l->kernel_y; y++)
            for (int32_t x = 0; x < l->kernel_x; x++) {
                const int32_t offset = (channel + c) * plane + y * l->dilation_y * l->in_width + x * l->dilation_x;
                const int16_t *entry = l->table + code_at(l, first++) * (l->shifters + 1);
                if (!l->shifters && entry[0]) tap(0, &counts[0], offset, entry[0]);
                for (int s = 1; s <= l->shifters; s++)
                    if (entry[s] >= 0) tap(entry[0] < 0, &counts[entry[0] < 0], offset, entry[s]);
            }
}

static int32_t rounded(int32_t v, int places) {
    return places ? (int32_t)(((int64_t)v + ((int64_t)1 << (places - 1))) >> places) : v;
}

static void to_codes(const Codes *to, int32_t at, int32_t v) {
    int32_t code = 0;
    if (to->thresholds) {
        while (code < to->count && v >= to->thresholds[code]) code++;
        code = to->points[code];
    } else {
        const int64_t q = ((int64_t)v * to->m + to->half) >> to->n;
        code = (int32_t)(q < to->lo ? to->lo : q > to->hi ? to->hi : q);
    }
    if (to->type == 0) ((int8_t *)to->to)[at] = (int8_t)code;
    else if (to->type == 1) ((uint8_t *)to->to)[at] = (uint8_t)code;
    else ((int16_t *)to->to)[at] = (int16_t)code;
}

static void put(const Out *out, int32_t c, int32_t y, int32_t x, int32_t v) {
    const int32_t at = c * out->plane + y * out->row + x;
    if (out->relu_before && v < 0) v = 0;
    if (out->other) v = rounded(v, out->shift) + rounded(out->other[at], out->shift_other);
    if (out->relu && v < 0) v = 0;
    if (out->cap && v > out->cap[out->caps == 1 ? 0 : c]) v = out->cap[out->caps == 1 ? 0 : c];
    if (out->wide) out->wide[at] = v;
    for (int i = 0; i < out->layers; i++) {
        const Codes *to = out->codes + i;
        to_codes(to, to->start + c * to->plane + y * to->row + x, v);
    }
}

static void run_layer(const Layer *l, const void *x, const Out *out) {
    const int strided = l->stride_y != 1 || l->stride_x != 1;
    const int32_t row = strided ? l->out_width : l->in_width;
    const int32_t n = (l->out_height - 1) * row + l->out_width;
    const int32_t depth = l->inputs / l->groups, size = depth * l->kernel_y * l->kernel_x;
    for (int32_t c = 0; c < l->outputs; c++) {
        int counts[2];
        decode(l, c * size, c / (l->outputs / l->groups) * depth, counts);
        memset(acc, 0, (size_t)n * sizeof *acc);
        for (int side = 0; side < 2; side++) {
            if (l->type == 0) planes_int8(l, (const int8_t *)x, side, counts[side], n);
            else if (l->type == 1) planes_uint8(l, (const uint8_t *)x, side, counts[side], n);
            else planes_int16(l, (const int16_t *)x, side, counts[side], n);
        }
        for (int32_t y = 0; y < l->out_height; y++)
            for (int32_t i = 0; i < l->out_width; i++)
                put(out, c, y, i, (int32_t)((acc[y * row + i] * (int64_t)l->m[c] + l->b[c]) >> l->n[c]));
    }
}

#ifdef LQ_COPY
/* Copies with strides and zero channels before and after: slices, paddings, and plain steps such as a ReLU. */
static void run_copy(const int32_t *x, const Out *out, const int32_t shape[3], const int32_t from[3], int32_t stride_y,
                     int32_t stride_x, int32_t before) {
    for (int32_t c = 0; c < shape[0]; c++)
        for (int32_t y = 0; y < shape[1]; y++)
            for (int32_t i = 0; i < shape[2]; i++) {
                const int32_t k = c - before;
                const int32_t at = (k * from[1] + y * stride_y) * from[2] + i * stride_x;
                put(out, c, y, i, k < 0 || k >= from[0] ? 0 : x[at]);
            }
}

#endif

#ifdef LQ_POOL
typedef struct {
    int32_t kernel_y, kernel_x, stride_y, stride_x, padding_y, padding_x, m;
    int64_t half;
    uint8_t n, largest;
} Pool;

static void run_pool(const int32_t *x, const Out *out, const int32_t shape[3], const int32_t from[3], const Pool *p) {
    for (int32_t c = 0; c < shape[0]; c++)
        for (int32_t y = 0; y < shape[1]; y++)
            for (int32_t i = 0; i < shape[2]; i++) {
                int64_t sum = 0;
                int32_t most = -INT32_MAX;
                for (int32_t ky = 0; ky < p->kernel_y; ky++)
                    for (int32_t kx = 0; kx < p->kernel_x; kx++) {
                        const int32_t r = y * p->stride_y - p->padding_y + ky, s = i * p->stride_x - p->padding_x + kx;
                        if (r < 0 || s < 0 || r >= from[1] || s >= from[2]) continue;
                        const int32_t v = x[(c * from[1] + r) * from[2] + s];
                        sum += v;
                        if (v > most) most = v;
                    }
                put(out, c, y, i, p->largest ? most : (int32_t)((sum * p->m + p->half) >> p->n));
            }
}
#endif
