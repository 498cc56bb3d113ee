// What lets one header serve the CPU objects and, later, CUDA.
//
// Functions of csrc/shared live in an anonymous namespace on purpose: each CPU file is compiled
// once per instruction set, and a shared inline symbol would let the linker keep the AVX-512 copy
// for a CPU that has no AVX-512.
#pragma once

#ifdef __CUDACC__
#define PYNAS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PYNAS_HOST_DEVICE inline
#endif
