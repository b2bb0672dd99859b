// The functions that Python calls, of a source that has defined step_kernel for clusters of CLUSTER blocks of BLOCK_THREADS threads,
// and the struct Shared that it needs.

#pragma once

namespace {

cudaLaunchConfig_t configuration(int clusters, void* stream, cudaLaunchAttribute& attribute) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = CLUSTER;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t found{};
    found.gridDim = dim3(clusters * CLUSTER), found.blockDim = dim3(BLOCK_THREADS);
    found.dynamicSmemBytes = sizeof(Shared);
    found.stream = static_cast<cudaStream_t>(stream);
    found.attrs = &attribute, found.numAttrs = 1;
    return found;
}

}  // namespace

// Launch on `stream`, at most one cluster a tile; a.dx has a part for each cluster, a.loss a row for each block. Returns 0, or
// CUDA's error number.
extern "C" int launch(const Arguments* arguments, int clusters, void* stream) {
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = configuration(clusters, stream, attribute);
    const int bytes = sizeof(Shared);
    if (cudaError_t error = cudaFuncSetAttribute(step_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return error;
    return cudaLaunchKernelEx(&config, step_kernel, *arguments);
}

// How many clusters fit on the current device at once; negative: CUDA's error number.
extern "C" int launch_clusters() {
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = configuration(1, nullptr, attribute);
    const int bytes = sizeof(Shared);
    int clusters;
    cudaError_t error = cudaFuncSetAttribute(step_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (!error) error = cudaOccupancyMaxActiveClusters(&clusters, step_kernel, &config);
    return error ? -static_cast<int>(error) : clusters;
}
