// The functions that Python calls, of a source that has defined step_kernel and the struct Shared that it needs.

#pragma once

// For Python, which lays them out too.
extern "C" int arguments_size() { return sizeof(Arguments); }

// Launch on `stream`; Returns 0, or CUDA's error number.
extern "C" int launch(const Arguments* arguments, int blocks, void* stream) {
    const int bytes = sizeof(Shared);
    if (cudaError_t error = cudaFuncSetAttribute(step_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return error;
    step_kernel<<<blocks, THREADS, bytes, static_cast<cudaStream_t>(stream)>>>(*arguments);
    return cudaGetLastError();
}

// How many blocks of it fit on the current device at once; negative: CUDA's error number.
extern "C" int launch_blocks() {
    const int bytes = sizeof(Shared);
    int device, units, blocks;
    cudaError_t error = cudaFuncSetAttribute(step_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (!error) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, step_kernel, THREADS, bytes);
    if (!error) error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&units, cudaDevAttrMultiProcessorCount, device);
    return error ? -static_cast<int>(error) : blocks * units;
}
