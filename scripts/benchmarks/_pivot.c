/* What a guest sees while its disk is moved, for benchmarks._pivot.

   probe ticks DEVICE MIB [AT]: writes so much (from AT MiB on, else 400), then ticks every 10 ms, by the timer alone and
   (another process) with a write of 4 KiB to the disk; every 250 ms each says its longest gap: TIMER MICROSECONDS, DISK MICROSECONDS.
   probe reads DEVICE: reads 128 MiB in a row and then 2000 times 4 KiB here and there, for ever: READS µs µs. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const long MIB = 1 << 20, DATA = 41; /* MiB: where the image's data is */
static long OWN = 400;                      /* MiB: where the guest writes */
static char *buffer;

static long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static void check(int good) {
    if (!good) {
        perror("probe");
        exit(1);
    }
}

static void tick(int fd, const char *name) {
    const struct timespec pause = {0, 10000000};
    long last = now(), said = last, longest = 0;
    for (;;) {
        nanosleep(&pause, NULL);
        if (fd >= 0)
            check(pwrite(fd, buffer, 4096, OWN * MIB) == 4096);
        long at = now();
        longest = at - last > longest ? at - last : longest;
        last = at;
        if (at - said > 250000) {
            printf("%s %ld\n", name, longest);
            fflush(stdout);
            last = said = now(); /* the serial port is slow */
            longest = 0;
        }
    }
}

int main(int argc, char **argv) {
    int fd = argc > 2 ? open(argv[2], O_RDWR | O_DIRECT) : -1;
    check(fd >= 0 && posix_memalign((void **)&buffer, 4096, MIB) == 0);
    memset(buffer, 's', MIB);
    if (argc > 4)
        OWN = atol(argv[4]);
    if (!strcmp(argv[1], "ticks")) {
        for (long at = 0; at < atol(argv[3]); at++)
            check(pwrite(fd, buffer, MIB, (OWN + at) * MIB) == MIB);
        printf("WROTE\n");
        fflush(stdout);
        if (fork())
            tick(-1, "TIMER");
        tick(fd, "DISK");
    }
    for (unsigned seed = 1;;) {
        long began = now();
        for (long at = 0; at < 128; at++)
            check(pread(fd, buffer, MIB, (DATA + at) * MIB) == MIB);
        long between = now();
        for (int at = 0; at < 2000; at++) {
            seed = seed * 1103515245 + 12345;
            check(pread(fd, buffer, 4096, DATA * MIB + (seed >> 8) % 32768 * 4096L) == 4096);
        }
        printf("READS %ld %ld\n", between - began, now() - between);
        fflush(stdout);
    }
}
