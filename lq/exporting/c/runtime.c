/* Layers run plane by plane: for one output channel the weights are unpacked and decoded once, then every tap adds its
   plane of inputs to the sums, eight taps in one pass: multiplied, or, with shifters, all those of one place and sign
   together, which are shifted once. Right shifts of negative numbers are arithmetic, as gcc and clang define them. */

#if defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#pragma GCC optimize("O3")
#endif

static uint32_t acc[LQ_ACC]; /* unsigned: what is never looked at may wrap around */
static int32_t line[LQ_LINE]; /* a row of results */
static int32_t offsets[LQ_TAPS + 1];
static int16_t factors[LQ_TAPS];        /* weights; with shifters where the table has each code */
static int32_t starts[LQ_GROUPS + 1];   /* with shifters, where the taps of each group begin */

/* LQ_BLOCK results at a time; those behind the last are computed from whatever lies there, and never looked at. */
#define BLOCKS                                                                                                     \
    for (j = 0; j < n; j += LQ_BLOCK)                                                                              \
        for (k = j; k < j + LQ_BLOCK; k++)

#define EIGHT(TYPE)                                                                                                \
    const TYPE *p0 = x + o[i], *p1 = x + o[i + 1], *p2 = x + o[i + 2], *p3 = x + o[i + 3];                         \
    const TYPE *p4 = x + o[i + 4], *p5 = x + o[i + 5], *p6 = x + o[i + 6], *p7 = x + o[i + 7];

#define PRODUCTS(TYPE, SUM)                                                                                        \
    for (; i + 8 <= count; i += 8) {                                                                               \
        EIGHT(TYPE)                                                                                                \
        const int f0 = f[i], f1 = f[i + 1], f2 = f[i + 2], f3 = f[i + 3];                                          \
        const int f4 = f[i + 4], f5 = f[i + 5], f6 = f[i + 6], f7 = f[i + 7];                                      \
        BLOCKS sums[k] += (uint32_t)(SUM)(                                                                         \
            (uint32_t)(p0[k] * f0) + (uint32_t)(p1[k] * f1) + (uint32_t)(p2[k] * f2) + (uint32_t)(p3[k] * f3) +    \
            (uint32_t)(p4[k] * f4) + (uint32_t)(p5[k] * f5) + (uint32_t)(p6[k] * f6) + (uint32_t)(p7[k] * f7));    \
    }                                                                                                              \
    for (; i < count; i++) {                                                                                       \
        const TYPE *p = x + o[i];                                                                                  \
        const int factor = f[i];                                                                                   \
        BLOCKS sums[k] += (uint32_t)(p[k] * factor);                                                               \
    }

#define SHIFTED(TYPE, SUM, SIGN)                                                                                   \
    for (; i + 8 <= end; i += 8) {                                                                                 \
        EIGHT(TYPE)                                                                                                \
        BLOCKS sums[k] SIGN (uint32_t)(SUM)(p0[k] + p1[k] + p2[k] + p3[k] + p4[k] + p5[k] + p6[k] + p7[k]) << place;\
    }                                                                                                              \
    for (; i + 2 <= end; i += 2) {                                                                                 \
        const TYPE *p0 = x + o[i], *p1 = x + o[i + 1];                                                             \
        BLOCKS sums[k] SIGN (uint32_t)(SUM)(p0[k] + p1[k]) << place;                                               \
    }                                                                                                              \
    for (; i < end; i++) {                                                                                         \
        const TYPE *p = x + o[i];                                                                                  \
        BLOCKS sums[k] SIGN (uint32_t)p[k] << place;                                                               \
    }

#define PLANES(NAME, TYPE, SUM)                                                                                    \
    static void NAME(const Layer *l, const TYPE *restrict x, uint32_t *restrict sums, int count, int n) {          \
        const int32_t *o = offsets;                                                                                \
        const int16_t *f = factors;                                                                                \
        int i = 0, j, k;                                                                                           \
        if (l->shifters)                                                                                           \
            for (int group = 0; group < LQ_GROUPS; group++) {                                                      \
                const int place = group >> 1, end = starts[group + 1];                                             \
                if (group & 1) { SHIFTED(TYPE, SUM, -=) }                                                          \
                else { SHIFTED(TYPE, SUM, +=) }                                                                    \
            }                                                                                                      \
        else if (l->narrow) { PRODUCTS(TYPE, int16_t) }                                                            \
        else { PRODUCTS(TYPE, int32_t) }                                                                           \
    }

PLANES(planes_int8, int8_t, int16_t)
PLANES(planes_uint8, uint8_t, int16_t)
PLANES(planes_int16, int16_t, int32_t)

static int code_at(const Layer *l, int32_t index) {
    int32_t bit = index * l->bits;
    unsigned both = l->packed[bit >> 3];
    if ((bit & 7) + l->bits > 8) both |= (unsigned)l->packed[(bit >> 3) + 1] << 8;
    return (int)((both >> (bit & 7)) & ((1u << l->bits) - 1u));
}

/* Offset of each tap of a group of channels that begins with this one; the number of them. */
static int places_of_taps(const Layer *l, int32_t channel) {
    const int32_t depth = l->inputs / l->groups, plane = l->in_height * l->in_width;
    int count = 0;
    for (int32_t c = 0; c < depth; c++)
        for (int32_t y = 0; y < l->kernel_y; y++) {
            const int32_t offset = (channel + c) * plane + y * l->dilation_y * l->in_width;
            for (int32_t x = 0; x < l->kernel_x; x++) offsets[count++] = offset + x * l->dilation_x;
        }
    return count;
}

/* Offsets and weights of the taps of a channel that are not zero; the number of them. */
static int decode(const Layer *l, int32_t first, int32_t channel) {
    const int taps = places_of_taps(l, channel);
    int count = 0;
    for (int i = 0; i < taps; i++) {
        offsets[count] = offsets[i]; /* written over by the next one where the weight is zero */
        factors[count] = l->table[code_at(l, first + i)];
        count += factors[count] != 0;
    }
    return count;
}

/* The same for shifters: taps sorted by group, a place and a sign; what idle shifters would add lies behind them. */
static void decode_shifts(const Layer *l, int32_t first, int32_t channel) {
    const int32_t depth = l->inputs / l->groups, plane = l->in_height * l->in_width;
    const int32_t size = depth * l->kernel_y * l->kernel_x;
    const int16_t *f = factors;
    int32_t at[LQ_GROUPS + 1] = {0};
    for (int32_t i = 0; i < size; i++) {
        factors[i] = (int16_t)(code_at(l, first + i) * l->shifters);
        for (int s = 0; s < l->shifters; s++) at[l->table[factors[i] + s]]++;
    }
    starts[0] = 0;
    for (int g = 0; g < LQ_GROUPS; g++) {
        starts[g + 1] = starts[g] + at[g];
        at[g] = starts[g];
    }
    at[LQ_GROUPS] = starts[LQ_GROUPS];
    for (int32_t c = 0; c < depth; c++)
        for (int32_t y = 0; y < l->kernel_y; y++) {
            int32_t offset = (channel + c) * plane + y * l->dilation_y * l->in_width;
            for (int32_t x = 0; x < l->kernel_x; x++, offset += l->dilation_x, f++)
                for (int s = 0; s < l->shifters; s++) offsets[at[l->table[*f + s]]++] = offset;
        }
}

static int32_t rounded(int32_t v, int places) {
    return places ? (int32_t)(((int64_t)v + ((int64_t)1 << (places - 1))) >> places) : v;
}

#define TO_CODES(TYPE)                                                                                             \
    for (i = 0; i < n; i++) {                                                                                      \
        const int64_t q = (v[i] * (int64_t)to->m + to->half) >> to->n;                                             \
        ((TYPE *)to->to)[at + i] = (TYPE)(q < to->lo ? to->lo : q > to->hi ? to->hi : q);                          \
    }

static void to_codes(const Codes *to, int32_t at, const int32_t *v, int32_t n) {
    int32_t i;
    if (to->thresholds) {
        for (i = 0; i < n; i++) {
            int32_t code = 0;
            while (code < to->count && v[i] >= to->thresholds[code]) code++;
            if (to->type == 0) ((int8_t *)to->to)[at + i] = (int8_t)to->points[code];
            else if (to->type == 1) ((uint8_t *)to->to)[at + i] = (uint8_t)to->points[code];
            else ((int16_t *)to->to)[at + i] = to->points[code];
        }
    } else if (to->type == 0) TO_CODES(int8_t)
    else if (to->type == 1) TO_CODES(uint8_t)
    else TO_CODES(int16_t)
}

/* What is done to a row of results, and who gets it. */
static void put(const Out *out, int32_t c, int32_t y, int32_t *v, int32_t n) {
    const int32_t at = c * out->plane + y * out->row;
    int32_t i;
    if (out->relu_before)
        for (i = 0; i < n; i++) v[i] = v[i] < 0 ? 0 : v[i];
    if (out->other)
        for (i = 0; i < n; i++) v[i] = rounded(v[i], out->shift) + rounded(out->other[at + i], out->shift_other);
    if (out->relu)
        for (i = 0; i < n; i++) v[i] = v[i] < 0 ? 0 : v[i];
    if (out->cap) {
        const int32_t cap = out->cap[out->caps == 1 ? 0 : c];
        for (i = 0; i < n; i++) v[i] = v[i] > cap ? cap : v[i];
    }
    if (out->wide) memcpy(out->wide + at, v, (size_t)n * sizeof *v);
    for (i = 0; i < out->layers; i++) {
        const Codes *to = out->codes + i;
        to_codes(to, to->start + c * to->plane + y * to->row, v, n);
    }
}

/* A row of results from its sums, every `step`-th of them. */
static void finish(const Layer *l, int32_t c, int32_t y, const uint32_t *sums, int32_t step, const Out *out) {
    const int64_t m = l->m[c], b = l->b[c];
    const int places = l->n[c];
    for (int32_t i = 0; i < l->out_width; i++) line[i] = (int32_t)(((int32_t)sums[i * step] * m + b) >> places);
    put(out, c, y, line, l->out_width);
}
