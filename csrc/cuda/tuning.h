// What bears on the kernels' speed alone, in one place: every number may be overridden by -D, for
// nvcc and for the compiler of plan.cpp, and results keep their bits but for the norm, whose sum is
// split by chunk_bytes, threads and squares_blocks.
#pragma once

#include <cstdint>

#ifndef FUSED_EMA_CHUNK_BYTES
#define FUSED_EMA_CHUNK_BYTES 16384
#endif
#ifndef FUSED_EMA_THREADS
#define FUSED_EMA_THREADS 256
#endif
#ifndef FUSED_EMA_MIN_BLOCKS
#define FUSED_EMA_MIN_BLOCKS 4
#endif
#ifndef FUSED_EMA_SQUARES_BLOCKS
#define FUSED_EMA_SQUARES_BLOCKS 1024
#endif
#ifndef FUSED_EMA_UNROLL
#define FUSED_EMA_UNROLL 1
#endif
#ifndef FUSED_EMA_PERSISTENT
#define FUSED_EMA_PERSISTENT 1
#endif
// Cache hints of 16-byte accesses, as PTX spells them: ".L1::no_allocate", ".cs",
// ".L1::no_allocate.L2::256B".
#ifndef FUSED_EMA_LOAD_HINT
#define FUSED_EMA_LOAD_HINT ""
#endif
#ifndef FUSED_EMA_STORE_HINT
#define FUSED_EMA_STORE_HINT ""
#endif

namespace fused_ema::cuda {

// A chunk is what a block steps at a time: the same bytes of a parameter for every type. Large
// enough that looking up its slot and scalars is small beside it, small enough that a model of a
// million parameters still has more chunks than the GPU has multiprocessors.
constexpr int64_t chunk_bytes = FUSED_EMA_CHUNK_BYTES;

constexpr int threads = FUSED_EMA_THREADS;

// Four blocks to a multiprocessor leave a thread 64 of its 65536 registers: enough warps to hide
// the latency of memory, and enough registers for all loads of 16 bytes to be under way at once.
constexpr int min_blocks = FUSED_EMA_MIN_BLOCKS;

// Blocks of the norm's grid. They fill any GPU of today. The number does not depend on the device,
// because the order of a sum decides its bits.
constexpr int64_t squares_blocks = FUSED_EMA_SQUARES_BLOCKS;

// Packs of a chunk that the compiler may take at once in a thread's loop over them.
constexpr int unroll = FUSED_EMA_UNROLL;

// Whether the step's grid is what the GPU runs at a time, and goes from chunk to chunk; else it has
// a block a chunk.
constexpr bool persistent = FUSED_EMA_PERSISTENT != 0;

static_assert(chunk_bytes % 16 == 0, "chunks begin at multiples of the widest access");

}  // namespace fused_ema::cuda
