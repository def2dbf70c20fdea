// The CUDA kernel and its launcher as C++, in place of what nvcc makes of them.
#include "cuda/step.cu"

#include <cuda_runtime.h>
