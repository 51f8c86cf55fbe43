// A CUDA driver without a device: answers as it is told to, and keeps what it was asked to launch.
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
typedef struct {
    uint32_t grid[3], block[3], shared, count;
    uint64_t function, stream;
    uint8_t arguments[64][8];
} Launch;

EXPORT int version = 13000, capability = 90, shared_optin = 232448, load_error = 0, launch_error = 0;
EXPORT int launches = 0, modules = 0, dynamic_shared = 0;
EXPORT char function_name[256];
EXPORT Launch last;
EXPORT uint32_t sizes[64];  // bytes of each argument, set by the test
EXPORT uint32_t arguments = 0;

EXPORT int cuDriverGetVersion(int *out) { *out = version; return 0; }
EXPORT int cuCtxGetDevice(int *device) { *device = 0; return 0; }
EXPORT int cuDeviceGetAttribute(int *out, int attribute, int device) {
    switch (attribute) {
        case 75: *out = capability / 10; return 0;
        case 76: *out = capability % 10; return 0;
        case 97: *out = shared_optin; return 0;
        case 8: *out = 49152; return 0;
    }
    return 1;
}
EXPORT int cuModuleLoadData(void **module, const void *image) {
    if (load_error || memcmp(image, "\177ELF", 4)) return load_error ? load_error : 200;
    *module = (void *)(uintptr_t)++modules;
    return 0;
}
EXPORT int cuModuleGetFunction(void **function, void *module, const char *name) {
    strncpy(function_name, name, sizeof function_name - 1);
    *function = (void *)((uintptr_t)module + 1000);
    return 0;
}
EXPORT int cuFuncSetAttribute(void *function, int attribute, int value) {
    if (attribute == 8) dynamic_shared = value;
    return 0;
}
EXPORT int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                          unsigned by, unsigned bz, unsigned shared, void *stream, void **values,
                          void **extra) {
    if (launch_error) return launch_error;
    Launch now = {{gx, gy, gz}, {bx, by, bz}, shared, arguments, (uintptr_t)function,
                  (uintptr_t)stream, {{0}}};
    for (uint32_t i = 0; i < arguments; i++) memcpy(now.arguments[i], values[i], sizes[i]);
    last = now;
    launches++;
    return 0;
}
