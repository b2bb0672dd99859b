// The kernel, and the functions that Python calls. The source that includes this defines the struct Shared, THREADS, BLOCKS (on a
// multiprocessor) and run(shared, arguments), the work of a thread.

#pragma once

namespace {

__global__ void __launch_bounds__(THREADS, BLOCKS) step_kernel(const Arguments a) {
    extern __shared__ __align__(1024) uint8_t memory[];
    run(*reinterpret_cast<Shared*>(memory), a);
}

}  // namespace

// Python compares it with the size of its own struct.
extern "C" int arguments_size() { return sizeof(Arguments); }

// Launches on `stream`. Returns 0 or a CUDA error number.
extern "C" int launch(const Arguments* arguments, int blocks, void* stream) {
    const int bytes = sizeof(Shared);
    if (cudaError_t error = cudaFuncSetAttribute(step_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return error;
    step_kernel<<<blocks, THREADS, bytes, static_cast<cudaStream_t>(stream)>>>(*arguments);
    return cudaGetLastError();
}

// Returns how many blocks the current device runs at once, or a CUDA error number, negated.
extern "C" int launch_blocks() {
    const int bytes = sizeof(Shared);
    int device, units, blocks;
    cudaError_t error = cudaFuncSetAttribute(step_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (!error) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, step_kernel, THREADS, bytes);
    if (!error) error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&units, cudaDevAttrMultiProcessorCount, device);
    return error ? -static_cast<int>(error) : blocks * units;
}
