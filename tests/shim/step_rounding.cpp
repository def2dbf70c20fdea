// The CUDA kernels that round by random bits and their launchers as C++.
#include "cuda/step_rounding.cu"
