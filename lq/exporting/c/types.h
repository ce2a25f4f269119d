#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { /* how a result becomes the input of a layer, inside a frame of zeros */
    void *to;
    int32_t m, lo, hi; /* code = clip((value * m + half) >> n, lo, hi) */
    int64_t half;
    const int32_t *thresholds; /* or: the number of thresholds that the value has reached, */
    const int16_t *points;     /* and the integer that this code stands for */
    int32_t plane, row, start; /* element of channel c, row y, column x: start + c * plane + y * row + x */
    uint8_t n, count, type;    /* type of an element: 0 int8_t, 1 uint8_t, 2 int16_t */
} Codes;

typedef struct { /* what happens to a result before it is kept */
    const int32_t *other;   /* added, or 0 */
    int32_t *wide;          /* where it is kept, or 0 */
    const int32_t *cap;     /* upper end of the last ReLU, per channel where `caps` is not 1, or 0 */
    const Codes *codes;     /* layers that take it */
    int32_t plane, row;
    uint8_t shift, shift_other, relu_before, relu, caps, layers;
} Out;

typedef struct {
    const uint8_t *packed; /* weights, `bits` each, from the lowest bit upwards */
    const int16_t *table;  /* integer of each code; or of each shifter a group: 2 * place + sign, LQ_GROUPS where idle */
    const int32_t *m;
    const int64_t *b;
    const uint8_t *n;      /* result = (sum * m + b) >> n, per output channel */
    int32_t inputs, outputs, groups, kernel_y, kernel_x, stride_y, stride_x, dilation_y, dilation_x;
    int32_t in_height, in_width, out_height, out_width;
    uint8_t bits, shifters, narrow, type;
    uint8_t negative, taps; /* whether there are inputs below 0; how many of them fit into 8 bits when added */
} Layer;
