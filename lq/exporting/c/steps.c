/* One function for each kind of step. */

static void run_layer(const Layer *l, const void *x, const Out *out) {
    /* without strides a plane is one long row, with them every row of results is one pass that skips columns after */
    const int strided = l->stride_y != 1 || l->stride_x != 1;
    const int32_t rows = strided ? l->out_height : 1;
    const int32_t n = (strided ? 0 : (l->out_height - 1) * l->in_width) + (l->out_width - 1) * l->stride_x + 1;
    const int32_t depth = l->inputs / l->groups, size = depth * l->kernel_y * l->kernel_x;
#ifdef LQ_SIMD
    if (!l->shifters && l->stride_x <= 2) {
        run_products(l, x, out);
        return;
    }
#endif
    for (int32_t c = 0; c < l->outputs; c++) {
        const int32_t channel = c / (l->outputs / l->groups) * depth;
        int count = 0;
        if (l->shifters) decode_shifts(l, c * size, channel);
        else count = decode(l, c * size, channel);
        for (int32_t r = 0; r < rows; r++) {
            const int32_t start = r * l->stride_y * l->in_width;
            memset(acc, 0, (size_t)n * sizeof *acc);
#ifdef LQ_SIMD
            if (l->shifters && l->type != 2) shifted(l, (const char *)x + start, acc, n);
            else
#endif
            if (l->type == 0) planes_int8(l, (const int8_t *)x + start, acc, count, n);
            else if (l->type == 1) planes_uint8(l, (const uint8_t *)x + start, acc, count, n);
            else planes_int16(l, (const int16_t *)x + start, acc, count, n);
            for (int32_t y = r; y < (strided ? r + 1 : l->out_height); y++)
                finish(l, c, y, acc + (y - r) * l->in_width, l->stride_x, out);
        }
    }
}

#ifdef LQ_COPY
/* Copies with strides and zero channels before and after: slices, paddings, and plain steps such as a ReLU. */
static void run_copy(const int32_t *x, const Out *out, const int32_t shape[3], const int32_t from[3], int32_t stride_y,
                     int32_t stride_x, int32_t before) {
    for (int32_t c = 0; c < shape[0]; c++)
        for (int32_t y = 0; y < shape[1]; y++) {
            const int32_t k = c - before, at = (k * from[1] + y * stride_y) * from[2];
            for (int32_t i = 0; i < shape[2]; i++) line[i] = k < 0 || k >= from[0] ? 0 : x[at + i * stride_x];
            put(out, c, y, line, shape[2]);
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
        for (int32_t y = 0; y < shape[1]; y++) {
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
                line[i] = p->largest ? most : (int32_t)((sum * p->m + p->half) >> p->n);
            }
            put(out, c, y, line, shape[2]);
        }
}
#endif
