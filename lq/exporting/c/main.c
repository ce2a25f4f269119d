#ifndef LQ_NO_MAIN
#include <time.h>

/* Reads images as input codes from a file and prints their logits: ./net images.bin [repeats]
   Says what an image must look like: ./net --input */
int main(int argc, char **argv) {
    static lq_input image[LQ_INPUTS];
    static int32_t logits[LQ_OUTPUTS];
    const long repeats = argc > 2 ? strtol(argv[2], NULL, 10) : 1;
    FILE *file = argc > 1 ? fopen(argv[1], "rb") : NULL;
    clock_t spent = 0;
    long images = 0;
    if (argc > 1 && !strcmp(argv[1], "--input")) {
        puts(LQ_INPUT_TEXT);
        return 0;
    }
    if (!file || repeats < 1) {
        fprintf(stderr, "usage: %s images.bin [repeats]\n", argv[0]);
        return 2;
    }
    while (fread(image, sizeof *image, LQ_INPUTS, file) == LQ_INPUTS) {
        const clock_t start = clock();
        for (long r = 0; r < repeats; r++) lq_run(image, logits);
        spent += clock() - start;
        images++;
        for (int i = 0; i < LQ_OUTPUTS; i++) printf("%ld%c", (long)logits[i], i + 1 < LQ_OUTPUTS ? ' ' : '\n');
    }
    fclose(file);
    fprintf(stderr, "flash %d bytes of constants, ram %d bytes", LQ_FLASH, LQ_RAM);
#ifdef LQ_SIMD
    fprintf(stderr, " and %d for SSE2", (int)(sizeof pairs + sizeof rows));
#endif
    if (images) {
        const int64_t nanoseconds = (int64_t)spent * 1000000000 / CLOCKS_PER_SEC / (images * repeats);
        fprintf(stderr, ", %ld.%03ld us per image", (long)(nanoseconds / 1000), (long)(nanoseconds % 1000));
    }
    fprintf(stderr, "\n");
    return 0;
}
#endif
