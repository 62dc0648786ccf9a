/* An NVIDIA H100 that is not there: what torch and triton ask of CUDA while they compile.
 *
 * Preloaded, it stands before CUDA's runtime and for its driver (libcuda.so.1). It answers questions about the device,
 * its memory is the host's, and it takes machine code without looking at it. Nothing can be launched: that still goes
 * to the real runtime, which finds no driver, or to a symbol that is missing here.
 */
#include <stdlib.h>
#include <string.h>

#include <cuda.h>
#include <cuda_runtime_api.h>

/* CUDA programming guide, compute capability 9.0 */
enum {
    MAJOR = 9, MINOR = 0, WARP = 32, PROCESSORS = 132, THREADS = 1024, PROCESSOR_THREADS = 2048, REGISTERS = 65536,
    SHARED = 49152, SHARED_OPTIN = 232448, PROCESSOR_SHARED = 233472, L2 = 50 << 20
};
static const size_t MEMORY = (size_t)80 << 30;
static void *const SOMETHING = (void *)1; /* a handle that nobody looks into */

/* The runtime: devices */

cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = *greatest = 0, cudaSuccess; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
    if (device) return cudaErrorInvalidDevice;
    memset(found, 0, sizeof *found);
    strcpy(found->name, "NVIDIA H100 that is not there");
    found->major = MAJOR, found->minor = MINOR;
    found->warpSize = WARP, found->multiProcessorCount = PROCESSORS;
    found->maxThreadsPerBlock = THREADS, found->maxThreadsPerMultiProcessor = PROCESSOR_THREADS;
    found->regsPerBlock = found->regsPerMultiprocessor = REGISTERS;
    found->sharedMemPerBlock = SHARED, found->sharedMemPerBlockOptin = SHARED_OPTIN;
    found->sharedMemPerMultiprocessor = PROCESSOR_SHARED;
    found->l2CacheSize = L2, found->totalGlobalMem = MEMORY;
    return cudaSuccess;
}

/* The runtime: errors, streams, memory */

cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return (void)stream, cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return (void)mode, cudaSuccess; }

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    return (void)stream, *status = cudaStreamCaptureStatusNone, cudaSuccess;
}

#if CUDART_VERSION >= 13000 /* asked by torch since 2.14, which is built for it */
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count
) {
    (void)id, (void)graph, (void)nodes, (void)edges, (void)count;
    return cudaStreamIsCapturing(stream, status);
}
#endif

cudaError_t cudaMemGetInfo(size_t *left, size_t *total) { return *left = *total = MEMORY, cudaSuccess; }
cudaError_t cudaMalloc(void **place, size_t bytes) {
    return (*place = malloc(bytes)) ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void *place) { return free(place), cudaSuccess; }

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return (void)kind, (void)stream, memcpy(to, from, bytes), cudaSuccess;
}

/* The driver: contexts and devices */

CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *found, int number) { return *found = number, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *found) { return *found = 0, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = SOMETHING, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return (void)context, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return (void)limit, *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return (void)limit, (void)value, CUDA_SUCCESS; }

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    return (void)device, *context = SOMETHING, CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned int *flags, int *active) {
    return (void)device, *flags = 0, *active = 1, CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    (void)device;
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = MAJOR; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = MINOR; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = PROCESSORS; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = WARP; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = REGISTERS; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = SHARED; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED_OPTIN; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = PROCESSOR_SHARED; break;
    default: *value = 0; /* clock rates */
    }
    return CUDA_SUCCESS;
}

/* The driver: machine code */

CUresult cuModuleLoad(CUmodule *module, const char *path) { return (void)path, *module = SOMETHING, CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    return (void)image, *module = SOMETHING, CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    return (void)module, (void)name, *function = SOMETHING, CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return (void)module, CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    return (void)function, (void)attribute, (void)value, CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
    return (void)function, (void)config, CUDA_SUCCESS;
}

/* Registers and bytes spilled are not known: none. */
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    (void)function;
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? THREADS : 0;
    return CUDA_SUCCESS;
}

/* Only a launch would ask. */
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr place) {
    return (void)value, (void)attribute, (void)place, CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    return (void)error, *text = "nothing runs on a GPU that is not there", CUDA_SUCCESS;
}
