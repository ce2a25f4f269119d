/* The same sums in the 128-bit registers that every x86-64 processor has; -DLQ_PORTABLE leaves them out. Exact, too:
   sums wrap around as those of uint32_t do, and what lies behind the last result of a row is never looked at. */

#if defined(__SSE2__) && !defined(LQ_PORTABLE)
#include <emmintrin.h>
#define LQ_SIMD
#define LQ_WIDE 4 /* output channels that share what is read of the inputs */
#define INLINE static inline __attribute__((always_inline))

static int16_t pairs[(LQ_TAPS + 1) * LQ_WIDE];    /* weights of two taps side by side, then of the next channel */
static uint32_t rows[LQ_WIDE][(LQ_LINE + 7) / 8 * 8]; /* a row of sums of each channel */

/* Eight inputs in 16 bits each: neighbours, or every other one. */
INLINE __m128i eight(const char *x, int type, int step) {
    const __m128i zero = _mm_setzero_si128();
    if (type == 2) {
        const __m128i a = _mm_loadu_si128((const __m128i *)x);
        if (step == 1) return a;
        const __m128i b = _mm_loadu_si128((const __m128i *)(x + 16));
        return _mm_packs_epi32(_mm_srai_epi32(_mm_slli_epi32(a, 16), 16), _mm_srai_epi32(_mm_slli_epi32(b, 16), 16));
    }
    if (step == 2) {
        const __m128i a = _mm_loadu_si128((const __m128i *)x);
        return type ? _mm_and_si128(a, _mm_set1_epi16(255)) : _mm_srai_epi16(_mm_slli_epi16(a, 8), 8);
    }
    const __m128i a = _mm_loadl_epi64((const __m128i *)x);
    return type ? _mm_unpacklo_epi8(a, zero) : _mm_srai_epi16(_mm_unpacklo_epi8(zero, a), 8);
}

INLINE void products(const char *x, int n, int count, int type, int step, int wide) {
    const int size = type == 2 ? 2 : 1;
    for (int j = 0; j < n; j += 8, x += 8 * size * step) {
        __m128i first[LQ_WIDE], second[LQ_WIDE];
        for (int k = 0; k < wide; k++) first[k] = second[k] = _mm_setzero_si128();
        for (int i = 0; i < count; i += 2) {
            const __m128i a = eight(x + offsets[i] * size, type, step), b = eight(x + offsets[i + 1] * size, type, step);
            const __m128i low = _mm_unpacklo_epi16(a, b), high = _mm_unpackhi_epi16(a, b);
            for (int k = 0; k < wide; k++) {
                int32_t pair;
                memcpy(&pair, pairs + i * LQ_WIDE + 2 * k, sizeof pair);
                const __m128i both = _mm_set1_epi32(pair);
                first[k] = _mm_add_epi32(first[k], _mm_madd_epi16(low, both));
                second[k] = _mm_add_epi32(second[k], _mm_madd_epi16(high, both));
            }
        }
        for (int k = 0; k < wide; k++) {
            _mm_storeu_si128((__m128i *)(rows[k] + j), first[k]);
            _mm_storeu_si128((__m128i *)(rows[k] + j + 4), second[k]);
        }
    }
}

#define PRODUCTS_OF(TYPE, STEP)                                                                                    \
    case 2 * TYPE + STEP:                                                                                          \
        if (wide == 1) products(x, n, count, TYPE, STEP, 1);                                                       \
        else products(x, n, count, TYPE, STEP, LQ_WIDE);                                                           \
        break;

static void row_of_products(const char *x, int n, int count, int type, int step, int wide) {
    switch (2 * type + step) {
        PRODUCTS_OF(0, 1) PRODUCTS_OF(0, 2) PRODUCTS_OF(1, 1) PRODUCTS_OF(1, 2) PRODUCTS_OF(2, 1) PRODUCTS_OF(2, 2)
    }
}

/* Offsets of all taps and, in pairs, the weights of some channels; the number of taps, made even. */
static int decode_pairs(const Layer *l, int32_t channel, int wide) {
    const int32_t depth = l->inputs / l->groups, size = depth * l->kernel_y * l->kernel_x;
    const int count = places_of_taps(l, channel / (l->outputs / l->groups) * depth);
    if (count & 1) { /* the other one of the last pair: nothing times the first input */
        offsets[count] = 0;
        for (int k = 0; k < wide; k++) pairs[(count - 1) * LQ_WIDE + 2 * k + 1] = 0;
    }
    for (int k = 0; k < wide; k++)
        for (int32_t i = 0; i < size; i++)
            pairs[(i & ~1) * LQ_WIDE + 2 * k + (i & 1)] = l->table[code_at(l, (channel + k) * size + i)];
    return (count + 1) & ~1;
}

static void run_products(const Layer *l, const char *x, const Out *out) {
    const int32_t share = l->outputs / l->groups, row = l->in_width * l->stride_y * (l->type == 2 ? 2 : 1);
    for (int32_t c = 0, wide; c < l->outputs; c += wide) {
        wide = share - c % share < LQ_WIDE ? 1 : LQ_WIDE;
        const int count = decode_pairs(l, c, wide);
        for (int32_t y = 0; y < l->out_height; y++) {
            row_of_products(x + y * row, l->out_width, count, l->type, l->stride_x, wide);
            for (int k = 0; k < wide; k++) finish(l, c + k, y, rows[k], 1, out);
        }
    }
}

/* What shifters add: taps of one place and sign in 8 bits as long as they fit, then in 16, shifted in 32. */
static void shifted(const Layer *l, const char *x, uint32_t *sums, int n) {
    const __m128i zero = _mm_setzero_si128();
    for (int j = 0; j < n; j += 16, x += 16) {
        __m128i s[4] = {zero, zero, zero, zero};
        for (int group = 0, i = 0; group < LQ_GROUPS && i < starts[LQ_GROUPS]; group++) {
            const __m128i place = _mm_cvtsi32_si128(group >> 1);
            while (i < starts[group + 1]) {
                const int32_t end = starts[group + 1] < i + 128 ? starts[group + 1] : i + 128;
                __m128i low = zero, high = zero;
                while (i < end) {
                    const int32_t stop = end < i + l->taps ? end : i + l->taps;
                    __m128i v = _mm_loadu_si128((const __m128i *)(x + offsets[i++]));
                    while (i < stop) v = _mm_add_epi8(v, _mm_loadu_si128((const __m128i *)(x + offsets[i++])));
                    const __m128i sign = l->negative ? _mm_cmpgt_epi8(zero, v) : zero;
                    low = _mm_add_epi16(low, _mm_unpacklo_epi8(v, sign));
                    high = _mm_add_epi16(high, _mm_unpackhi_epi8(v, sign));
                }
                const __m128i below = _mm_cmpgt_epi16(zero, low), above = _mm_cmpgt_epi16(zero, high);
                const __m128i four[4] = {_mm_unpacklo_epi16(low, below), _mm_unpackhi_epi16(low, below),
                                         _mm_unpacklo_epi16(high, above), _mm_unpackhi_epi16(high, above)};
                for (int k = 0; k < 4; k++) {
                    const __m128i term = _mm_sll_epi32(four[k], place);
                    s[k] = group & 1 ? _mm_sub_epi32(s[k], term) : _mm_add_epi32(s[k], term);
                }
            }
        }
        for (int k = 0; k < 4; k++) _mm_storeu_si128((__m128i *)(sums + j + 4 * k), s[k]);
    }
}
#endif
