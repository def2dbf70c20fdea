// The other CUDA kernels and their launchers as C++, in place of what nvcc makes of them.
#include "cuda/step.cu"

#include "cuda/fold.cu"
#include "cuda/squares.cu"
#include "cuda/trust.cu"
