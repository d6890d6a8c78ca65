/* The calls of the CUDA driver that the agent makes, on ordinary memory: libcuda.so.1 of a machine without a GPU. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define STREAM ((void *)0x57)

static int current;

int cuInit(unsigned flags) { return flags; }
int cuDeviceGet(int *device, int ordinal) { *device = 7; return ordinal; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &current; return device == 7 ? 0 : 101; }
int cuCtxSetCurrent(void *context) { current = context == &current; return current ? 0 : 201; }
int cuStreamCreate(void **stream, unsigned flags) { *stream = STREAM; return current && flags == 1 ? 0 : 201; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "Xavier", length); return device == 7 ? 0 : 101; }
int cuGetErrorString(int code, const char **words) { *words = code == 2 ? "out of memory" : "invalid"; return 0; }

int cuMemAlloc_v2(uint64_t *memory, size_t bytes) {
    if (getenv("FAKE_FULL")) return 2;
    *memory = (uint64_t)malloc(bytes);
    return current ? 0 : 201;
}
int cuMemAllocHost_v2(void **memory, size_t bytes) { *memory = malloc(bytes); return current ? 0 : 201; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream) {
    memcpy((void *)to, from, bytes);
    return stream == STREAM ? 0 : 400;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
    memcpy(to, (void *)from, bytes);
    return stream == STREAM ? 0 : 400;
}
int cuStreamSynchronize(void *stream) { return stream == STREAM ? 0 : 400; }
