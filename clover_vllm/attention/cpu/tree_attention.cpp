// Tree attention (tree_attention.h) compiled for several instruction sets, and the library's plain C interface.
//
// One library runs on every CPU: the caller asks which levels this CPU has and names one. Nothing but what
// tree_attention.h defines is compiled for a level, so that no other function can hold instructions that the
// CPU lacks. No PyTorch headers: the library depends neither on PyTorch's ABI nor on Python's.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include <omp.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define CLOVER_X86_LEVELS
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

struct Problem {
  int paired;  // the caches' layout: 0 "vec", 1 "amx"
  int requests, heads, kv_heads, dim, block;
  int64_t block_stride, head_stride;                           // of the caches, in elements
  int64_t query_stride, key_stride, value_stride, out_stride;  // between rows, in elements
  int64_t table_stride;
  float scale;
  const int32_t* table;     // [requests][table_stride]
  const int32_t* starts;    // [requests], first row of each request
  const int32_t* stops;     // [requests], behind its last row
  const int32_t* prefixes;  // [requests], tokens in the cache before this step
  const uint64_t* masks;    // [rows], bit j: the request's j-th row of this step is visible
};

}  // namespace

// The x86-64 psABI's levels, and one above. v2 has SSE4.2, v3 AVX2, FMA and F16C, v4 AVX-512 (F, BW, CD, DQ, VL), amx
// tiles of bfloat16 besides. Instructions for bfloat16 and float16 alone would not help: arithmetic is float32. Clang has
// no such pragma and builds the one level of its target, as do all compilers for other architectures. Vectors wider
// than a level's registers are broken into single numbers and tens of times slower, hence LANES.
#ifdef CLOVER_X86_LEVELS
#define MATRIX_TILES 0
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v2")
namespace v2 {
constexpr int LANES = 4, TILE_ROWS = 6;
#include "tree_attention.h"
}  // namespace v2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace v3 {
constexpr int LANES = 8, TILE_ROWS = 6;
#include "tree_attention.h"
}  // namespace v3
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace v4 {
constexpr int LANES = 16, TILE_ROWS = 9;
#include "tree_attention.h"
}  // namespace v4
#pragma GCC pop_options
#undef MATRIX_TILES
#define MATRIX_TILES 1
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16")
namespace amx {
constexpr int LANES = 16, TILE_ROWS = 9;
#include "tree_attention.h"
}  // namespace amx
#pragma GCC pop_options
#else
#define MATRIX_TILES 0
namespace baseline {
constexpr int LANES = 4, TILE_ROWS = 9;
#include "tree_attention.h"
}  // namespace baseline
#endif

#ifdef CLOVER_X86_LEVELS
namespace {

// Whether the processor has matrix tiles of bfloat16 and the system lets this process use them.
bool has_tiles() {
  unsigned a, b, c, d;
  __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
  const bool tiles = d >> 22 & 1 && d >> 24 & 1;  // AMX-BF16, AMX-TILE
  __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(1));
  const bool conversion = a >> 5 & 1;  // AVX512_BF16
  constexpr long ask = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return tiles && conversion && syscall(SYS_arch_prctl, ask, tile_data) == 0;
}

}  // namespace
#endif

extern "C" {

// Levels that were compiled and that this CPU has, lowest first, with spaces between them.
const char* clover_levels() {
#ifdef CLOVER_X86_LEVELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return has_tiles() ? "v2 v3 v4 amx" : "v2 v3 v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "v2 v3";
  return __builtin_cpu_supports("x86-64-v2") ? "v2" : "";
#else
  return "baseline";
#endif
}

#define CLOVER_TREE_ATTENTION(LEVEL)                                                                           \
  int clover_tree_attention_##LEVEL(                                                                           \
      int dtype, int paired, int requests, int heads, int kv_heads, int dim, int block, int64_t block_stride,  \
      int64_t head_stride, int64_t query_stride, int64_t key_stride, int64_t value_stride, int64_t out_stride, \
      int64_t table_stride, float scale, const int32_t* table, const int32_t* starts, const int32_t* stops,    \
      const int32_t* prefixes, const uint64_t* masks, const void* query, const void* keys, const void* values, \
      const void* key_cache, const void* value_cache, void* output) {                                          \
    const Problem p{paired,       requests,    heads,        kv_heads,   dim,          block,      block_stride, \
                    head_stride,  query_stride, key_stride,  value_stride, out_stride, table_stride,           \
                    scale,        table,       starts,       stops,      prefixes,     masks};                 \
    return LEVEL::attend(dtype, p, query, keys, values, key_cache, value_cache, output);                       \
  }

// Attention at one level; only to be called where clover_levels() names it.
#ifdef CLOVER_X86_LEVELS
CLOVER_TREE_ATTENTION(v2)
CLOVER_TREE_ATTENTION(v3)
CLOVER_TREE_ATTENTION(v4)
CLOVER_TREE_ATTENTION(amx)
#else
CLOVER_TREE_ATTENTION(baseline)
#endif

// Copy cached rows to other slots, in order, in every layer. The caches are as above, keys of a
// block and head first, its values block * dim elements behind them. `size` is bytes per element.
int clover_move_rows(int size, int paired, int layers, int kv_heads, int dim, int block, int64_t block_stride,
                     int64_t head_stride, const uint64_t* caches, int moves, const int64_t* sources,
                     const int64_t* destinations) {
  if (size != 2 && size != 4) return 1;
  // Where a row begins, and how far from there dimension d is, in elements.
  const auto key = [=](int64_t row) { return paired ? row / 16 * 16 * dim + row % 16 * 2 : row; };
  const auto value = [=](int64_t row) { return (int64_t)dim * block + (paired ? row / 2 * 32 + row % 2 : row * dim); };
  const auto key_step = [=](int d) { return paired ? (int64_t)d / 2 * 32 + d % 2 : (int64_t)d * block; };
  const auto value_step = [=](int d) { return paired ? (int64_t)d / 16 * 16 * block + d % 16 * 2 : (int64_t)d; };
#pragma omp parallel for schedule(static)
  for (int i = 0; i < layers * kv_heads; i++) {
    char* base = (char*)caches[i / kv_heads] + (int64_t)(i % kv_heads) * head_stride * size;
    for (int m = 0; m < moves; m++) {
      char* from = base + sources[m] / block * block_stride * size;
      char* to = base + destinations[m] / block * block_stride * size;
      const int64_t a = sources[m] % block, b = destinations[m] % block;
      for (int d = 0; d < dim; d++) {
        std::memcpy(to + (key(b) + key_step(d)) * size, from + (key(a) + key_step(d)) * size, size);
        std::memcpy(to + (value(b) + value_step(d)) * size, from + (value(a) + value_step(d)) * size, size);
      }
    }
  }
  return 0;
}
}
