// Attention over a paged prefix and a draft tree, for vLLM's CPU key/value cache.
//
// A verifying request has M rows (root and nodes) in this step. Every row sees the whole prefix,
// which lies in the paged cache, and those rows of its own step that its bitmask names. The cache is
// in one of two of vLLM's layouts. "vec": per block and key/value head, keys are [head_dim][block], values
// [block][head_dim]. "amx", for bfloat16, has what a matrix tile multiplies side by side: keys are
// [block / 16][head_dim / 2][16][2], values [head_dim / 16][block / 2][16][2]. The step's own keys and values come
// unpacked, as the model computed them.
//
// Work is cut into (request, key/value head, span of prefix blocks); the last span of a head also
// takes the step's own rows. Each piece gives an unnormalised output, a maximum and a sum per query
// vector, and a second pass merges the pieces. All arithmetic is float32.
//
// No include guard and no includes: tree_attention.cpp includes this once per instruction set, each time in
// another namespace, which holds LANES (floats in a register) and TILE_ROWS (rows of a matrix tile whose sums, two
// registers each, stay in registers).

namespace {

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES), aligned(2)));
typedef _Float16 fvec __attribute__((vector_size(2 * LANES), aligned(2)));

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline vec load(const bf16* p) {
  hvec half = *reinterpret_cast<const hvec*>(p);
  uvec wide = __builtin_convertvector(half, uvec) << 16;
  return (vec)wide;
}
inline vec load(const fp16* p) { return __builtin_convertvector(*reinterpret_cast<const fvec*>(p), vec); }
// Two neighbours of each of LANES pairs.
inline void load_pairs(const bf16* p, vec& first, vec& second) {
  const uvec both = *reinterpret_cast<const uvec*>(p);
  first = (vec)(both << 16);
  second = (vec)(both & 0xffff0000u);
}
inline void store(float* p, vec v) { *reinterpret_cast<vec*>(p) = v; }
inline void store(bf16* p, vec v) {  // round to nearest, ties to even
  uvec u = (uvec)v;
  uvec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  *reinterpret_cast<hvec*>(p) = __builtin_convertvector(rounded, hvec);
}
inline void store(fp16* p, vec v) { *reinterpret_cast<fvec*>(p) = __builtin_convertvector(v, fvec); }
inline vec splat(float x) { return x - vec{}; }

// 2^x for x <= 0, to about 2 units in the last place; below 2^-126 it is 0, and NaN stays NaN.
inline vec exp2_vec(vec x) {
  vec low = splat(-126.0f);
  ivec vanishes = x < low;
  x = vanishes ? low : x;
  ivec whole = __builtin_convertvector(x - 0.5f, ivec);  // towards zero: floor or ceil of x, |rest| <= 1
  vec f = x - __builtin_convertvector(whole, vec);
  vec y = splat(1.5403530e-4f);
  y = y * f + 1.3333558e-3f;
  y = y * f + 9.6181291e-3f;
  y = y * f + 5.5504109e-2f;
  y = y * f + 2.4022651e-1f;
  y = y * f + 6.9314718e-1f;
  y = y * f + 1.0f;
  vec scaled = (vec)((ivec)y + (whole << 23));
  return vanishes ? vec{} : scaled;
}

inline float hmax(vec v) {
  float m = v[0];
  for (int i = 1; i < LANES; i++) m = std::max(m, v[i]);
  return m;
}
inline float hsum(vec v) {
  float s = 0;
  for (int i = 0; i < LANES; i++) s += v[i];
  return s;
}

// out[m][j] (+)= sum_k a[m][k] * b[k][j] for M rows and 2 vectors of columns.
template <int M>
inline void gemm_tile(const float* a, int lda, const float* b, int ldb, int depth, float* out, int ldo,
                      bool accumulate) {
  vec acc[M][2];
  for (int m = 0; m < M; m++)
    for (int c = 0; c < 2; c++) acc[m][c] = accumulate ? load(out + m * ldo + c * LANES) : vec{};
  for (int k = 0; k < depth; k++) {
    vec b0 = load(b + k * ldb), b1 = load(b + k * ldb + LANES);
    for (int m = 0; m < M; m++) {
      float x = a[m * lda + k];
      acc[m][0] += x * b0;
      acc[m][1] += x * b1;
    }
  }
  for (int m = 0; m < M; m++)
    for (int c = 0; c < 2; c++) store(out + m * ldo + c * LANES, acc[m][c]);
}

// Any number of rows; columns a multiple of 2 * LANES.
void gemm(const float* a, int lda, const float* b, int ldb, int rows, int depth, int columns, float* out, int ldo,
          bool accumulate) {
  for (int c = 0; c < columns; c += 2 * LANES) {
    int m = 0;
    for (; m + TILE_ROWS <= rows; m += TILE_ROWS)
      gemm_tile<TILE_ROWS>(a + m * lda, lda, b + c, ldb, depth, out + m * ldo + c, ldo, accumulate);
    for (; m + 3 <= rows; m += 3)
      gemm_tile<3>(a + m * lda, lda, b + c, ldb, depth, out + m * ldo + c, ldo, accumulate);
    for (; m < rows; m++) gemm_tile<1>(a + m * lda, lda, b + c, ldb, depth, out + m * ldo + c, ldo, accumulate);
  }
}

}  // namespace

namespace {

struct Piece {
  int request, head, first, last;  // prefix blocks first .. last - 1
  bool own;                        // also the step's own rows
  bool alone;                      // no other piece of this head: nothing to merge
  int64_t scratch;                 // offset of its partial results, floats
};

// Softmax state of `rows` query vectors over one tile of scores [rows][width], which become weights.
// A NaN score may be missing from the maximum, but makes the row's weight, sum and output NaN, as in plain softmax.
void weigh(float* scores, int rows, int width, int columns, int stride, int dim, float* out, float* maxima,
           float* sums) {
  for (int m = 0; m < rows; m++) {
    float* s = scores + m * stride;
    for (int j = columns; j < width; j++) s[j] = -INFINITY;
    vec top = load(s);
    for (int j = LANES; j < width; j += LANES) {
      vec v = load(s + j);
      top = top > v ? top : v;
    }
    float high = std::max(maxima[m], hmax(top));
    if (high == -INFINITY) {  // nothing visible so far, unless it is NaN
      vec lost = {};
      for (int j = 0; j < width; j += LANES) {
        const vec v = load(s + j), p = v != v ? v : vec{};
        store(s + j, p);
        lost += p;
      }
      sums[m] += hsum(lost);
      continue;
    }
    float shrink = maxima[m] == -INFINITY ? 0.0f : std::exp2(maxima[m] - high);
    vec total = {};
    for (int j = 0; j < width; j += LANES) {
      vec p = exp2_vec(load(s + j) - high);
      store(s + j, p);
      total += p;
    }
    sums[m] = sums[m] * shrink + hsum(total);
    maxima[m] = high;
    if (shrink != 1.0f)
      for (int d = 0; d < dim; d += LANES) store(out + m * dim + d, load(out + m * dim + d) * shrink);
  }
}

// `weigh`, then the values by their weights. Where values may be infinite or NaN (`finite` is false) those of weight
// 0 are skipped: 0 times them would reach rows that do not see them.
void absorb(float* scores, int rows, int width, int columns, int stride, const float* values, int dim, bool finite,
            float* out, float* maxima, float* sums) {
  weigh(scores, rows, width, columns, stride, dim, out, maxima, sums);
  if (finite) {
    gemm(scores, stride, values, dim, rows, columns, dim, out, dim, true);
    return;
  }
  for (int m = 0; m < rows; m++)
    for (int j = 0; j < columns; j++)
      if (const float weight = scores[m * stride + j]; weight != 0.0f)
        for (int d = 0; d < dim; d += LANES)
          store(out + m * dim + d, load(out + m * dim + d) + weight * load(values + j * dim + d));
}

// Keys of the step's own rows as columns at .. of a tile, their values as rows at .. . Whether all values are finite.
template <typename T>
bool load_own(const Problem& p, const T* keys, const T* values, int head, int first_row, int tree, int at, int width,
              float* k, float* v) {
  vec rest = {};  // x - x: 0, or NaN where x is not finite
  for (int j = 0; j < tree; j++) {
    const T* key = keys + (first_row + j) * p.key_stride + (int64_t)head * p.dim;
    const T* value = values + (first_row + j) * p.value_stride + (int64_t)head * p.dim;
    for (int d = 0; d < p.dim; d += LANES) {
      vec x = load(key + d);
      for (int i = 0; i < LANES; i++) k[(d + i) * width + at + j] = x[i];
      const vec y = load(value + d);
      rest += y - y;
      store(v + (at + j) * p.dim + d, y);
    }
  }
  return hsum(rest) == 0.0f;
}

// Hide what a row's bitmask does not name, in score columns at .. .
void hide(const Problem& p, int first_row, int tree, int group, int at, int width, float* s) {
  for (int m = 0; m < tree * group; m++) {
    const uint64_t mask = p.masks[first_row + m / group];
    for (int j = 0; j < tree; j++)
      if (!(mask >> j & 1)) s[m * width + at + j] = -INFINITY;
  }
}

// Cached keys of a block as [dim][width], of `filled` tokens, and values as [token][dim], of `tokens` or one more.
template <typename T>
void load_block(const Problem& p, const T* keys, const T* values, int tokens, int filled, int width, float* k,
                float* v) {
  const int dim = p.dim, block = p.block;
  if constexpr (std::is_same_v<T, bf16>) {
    if (p.paired) {
      for (int j = 0; j < filled; j += LANES) {
        const T* group = keys + (int64_t)(j / 16) * 16 * dim + j % 16 * 2;
        for (int d = 0; d < dim; d += 2) {
          vec first, second;
          load_pairs(group + d * 16, first, second);
          store(k + d * width + j, first);
          store(k + (d + 1) * width + j, second);
        }
      }
      for (int j = 0; j < tokens; j += 2)
        for (int d = 0; d < dim; d += LANES) {
          vec first, second;
          load_pairs(values + (int64_t)(d / 16) * 16 * block + j * 16 + d % 16 * 2, first, second);
          store(v + j * dim + d, first);
          store(v + (j + 1) * dim + d, second);
        }
      return;
    }
  }
  for (int d = 0; d < dim; d++)
    for (int j = 0; j < filled; j += LANES) store(k + d * width + j, load(keys + (int64_t)d * block + j));
  for (int64_t i = 0; i < (int64_t)tokens * dim; i += LANES) store(v + i, load(values + i));
}

#if MATRIX_TILES
// A tile register holds 16 rows of 64 bytes. The "amx" layout has the second factor of a product ready: 1 KiB of keys
// are 32 dimensions of 16 tokens, 1 KiB of values are 16 dimensions of 32 tokens.
constexpr int TILE = 16, TILE_ELEMENTS = 512;

inline void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, rest[15] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);
}

// scores[m][j] = sum_d query[m][d] keys[j][d], for rows that are a multiple of 16.
inline void score_tiles(const bf16* query, int rows, int dim, const bf16* keys, int columns, float* scores, int width) {
  for (int j = 0; j < columns; j += TILE)
    for (int m = 0; m < rows; m += 2 * TILE) {
      const bool two = m + TILE < rows;
      _tile_zero(0);
      _tile_zero(1);
      for (int d = 0; d < dim; d += 2 * TILE) {
        _tile_loadd(2, keys + (int64_t)j * dim + d * TILE, 64);
        _tile_loadd(3, query + m * dim + d, dim * 2);
        _tile_dpbf16ps(0, 3, 2);
        if (!two) continue;
        _tile_loadd(4, query + (m + TILE) * dim + d, dim * 2);
        _tile_dpbf16ps(1, 4, 2);
      }
      _tile_stored(0, scores + m * width + j, width * 4);
      if (two) _tile_stored(1, scores + (m + TILE) * width + j, width * 4);
    }
}

// out[m][d] = sum_j weights[m][j] values[j][d]; the last, unfilled tiles of the values are in `tail`.
inline void value_tiles(const bf16* weights, int rows, int width, const bf16* values, int block, int columns,
                        const bf16* tail, int dim, float* out) {
  for (int d = 0; d < dim; d += TILE)
    for (int m = 0; m < rows; m += 2 * TILE) {
      const bool two = m + TILE < rows;
      _tile_zero(0);
      _tile_zero(1);
      for (int j = 0; j < columns; j += 2 * TILE) {
        const bool filled = j + 2 * TILE <= columns;
        _tile_loadd(2, filled ? values + (int64_t)d * block + j * TILE : tail + d / TILE * TILE_ELEMENTS, 64);
        _tile_loadd(3, weights + m * width + j, width * 2);
        _tile_dpbf16ps(0, 3, 2);
        if (!two) continue;
        _tile_loadd(4, weights + (m + TILE) * width + j, width * 2);
        _tile_dpbf16ps(1, 4, 2);
      }
      _tile_stored(0, out + m * dim + d, dim * 4);
      if (two) _tile_stored(1, out + (m + TILE) * dim + d, dim * 4);
    }
}

// Absorbs the cached tokens of pieces in the "amx" layout. Unused slots may hold anything, NaN too.
struct Tiles {
  int rows, padded, dim, block, width;  // padded: rows to a multiple of 16
  float scale;
  bf16 *query, *weights, *tail;
  float *scores, *added;

  static size_t floats(int rows, int dim, int width) {
    const size_t padded = (rows + TILE - 1) / TILE * TILE;
    return (padded * dim + padded * width + (size_t)dim / TILE * TILE_ELEMENTS) / 2 + padded * (width + dim);
  }

  Tiles(float* buffer, int rows, int dim, int block, int width, float scale)
      : rows(rows), padded((rows + TILE - 1) / TILE * TILE), dim(dim), block(block), width(width), scale(scale) {
    scores = buffer;
    added = scores + (size_t)padded * width;
    query = (bf16*)(added + (size_t)padded * dim);
    weights = query + (size_t)padded * dim;
    tail = weights + (size_t)padded * width;
    std::memset((void*)(query + rows * dim), 0, sizeof(bf16) * (padded - rows) * dim);
    std::memset((void*)(weights + rows * width), 0, sizeof(bf16) * (padded - rows) * width);
    configure_tiles();
  }
  ~Tiles() { _tile_release(); }

  void absorb_block(const bf16* keys, const bf16* values, int tokens, float* out, float* maxima, float* sums) {
    const int filled = (tokens + 31) / 32 * 32;
    score_tiles(query, padded, dim, keys, tokens, scores, width);
    for (int m = 0; m < rows; m++)
      for (int j = 0; j < tokens; j += LANES) store(scores + m * width + j, load(scores + m * width + j) * scale);
    weigh(scores, rows, filled, tokens, width, dim, out, maxima, sums);
    for (int m = 0; m < rows; m++)
      for (int j = 0; j < filled; j += LANES)
        _mm256_storeu_si256((__m256i*)(weights + m * width + j),
                            (__m256i)_mm512_cvtneps_pbh((__m512)load(scores + m * width + j)));
    if (tokens < filled) {
      const int rest = tokens % 32, first = tokens - rest;
      for (int d = 0; d < dim; d += TILE) {
        bf16* to = tail + d / TILE * TILE_ELEMENTS;
        const bf16* from = values + (int64_t)d * block + first * TILE;
        std::memset((void*)to, 0, sizeof(bf16) * TILE_ELEMENTS);
        std::memcpy((void*)to, from, sizeof(bf16) * (rest / 2 * 32));
        if (rest % 2)
          for (int i = 0; i < 32; i += 2) to[rest / 2 * 32 + i] = from[rest / 2 * 32 + i];
      }
    }
    value_tiles(weights, padded, width, values, block, tokens, tail, dim, added);
    for (int i = 0; i < rows * dim; i += LANES) store(out + i, load(out + i) + load(added + i));
  }
};
#endif

inline int padded_to_tile(int columns) { return (columns + 2 * LANES - 1) / (2 * LANES) * 2 * LANES; }

template <typename T>
void run_piece(const Problem& p, const Piece& piece, const T* query, const T* keys, const T* values,
               const T* key_cache, const T* value_cache, float* scratch, T* output) {
  const int group = p.heads / p.kv_heads, dim = p.dim, block = p.block;
  const int first_row = p.starts[piece.request], tree = p.stops[piece.request] - first_row;
  const int rows = tree * group;  // query vector m is row m / group, head piece.head * group + m % group
  const int width = std::max(block, padded_to_tile(tree));
  thread_local std::vector<float> buffer;
  size_t needed = (size_t)rows * dim + (size_t)2 * dim * width + (size_t)rows * width;
#if MATRIX_TILES
  const size_t for_tiles = needed;
  needed += Tiles::floats(rows, dim, width);
#endif
  if (buffer.size() < needed) buffer.resize(needed);
  float* q = buffer.data();
  float* k = q + (size_t)rows * dim;
  float* v = k + (size_t)dim * width;
  float* s = v + (size_t)dim * width;
  float *out = scratch + piece.scratch, *maxima = out + (size_t)rows * dim, *sums = maxima + rows;
  const float scale = p.scale * 1.44269504f;  // scores in base 2
  for (int m = 0; m < rows; m++) {
    const T* from =
        query + (first_row + m / group) * p.query_stride + (int64_t)(piece.head * group + m % group) * dim;
    for (int d = 0; d < dim; d += LANES) store(q + m * dim + d, load(from + d) * scale);
  }
  std::memset(out, 0, sizeof(float) * rows * dim);
  std::fill(maxima, maxima + rows, -INFINITY);
  std::fill(sums, sums + rows, 0.0f);
  const int prefix = p.prefixes[piece.request];
  bool own = piece.own;
  int first = piece.first;
#if MATRIX_TILES
  if constexpr (std::is_same_v<T, bf16>)
    if (p.paired && piece.first < piece.last) {
      Tiles tiles(buffer.data() + for_tiles, rows, dim, block, width, scale);
      for (int m = 0; m < rows; m++)
        std::memcpy((void*)(tiles.query + m * dim),
                    query + (first_row + m / group) * p.query_stride + (int64_t)(piece.head * group + m % group) * dim,
                    sizeof(T) * dim);
      for (; first < piece.last; first++) {
        const int64_t at =
            p.table[piece.request * p.table_stride + first] * p.block_stride + piece.head * p.head_stride;
        tiles.absorb_block(key_cache + at, value_cache + at, std::min(block, prefix - first * block), out, maxima, sums);
      }
    }
#endif
  for (int b = first; b < piece.last; b++) {
    const int64_t at = p.table[piece.request * p.table_stride + b] * p.block_stride + piece.head * p.head_stride;
    const int prefix_columns = std::min(block, prefix - b * block);
    load_block(p, key_cache + at, value_cache + at, prefix_columns, padded_to_tile(prefix_columns), width, k, v);
    // The step's own rows ride in the last block's tile where they fit.
    const bool rides = own && b == piece.last - 1 && prefix_columns + tree <= width;
    const bool finite = !rides || load_own(p, keys, values, piece.head, first_row, tree, prefix_columns, width, k, v);
    const int columns = prefix_columns + (rides ? tree : 0), padded = padded_to_tile(columns);
    gemm(q, dim, k, width, rows, dim, padded, s, width, false);
    if (rides) hide(p, first_row, tree, group, prefix_columns, width, s), own = false;
    absorb(s, rows, padded, columns, width, v, dim, finite, out, maxima, sums);
  }
  if (own) {
    const int padded = padded_to_tile(tree);
    const bool finite = load_own(p, keys, values, piece.head, first_row, tree, 0, width, k, v);
    gemm(q, dim, k, width, rows, dim, padded, s, width, false);
    hide(p, first_row, tree, group, 0, width, s);
    absorb(s, rows, padded, tree, width, v, dim, finite, out, maxima, sums);
  }
  if (!piece.alone) return;
  for (int m = 0; m < rows; m++) {
    T* to = output + (first_row + m / group) * p.out_stride + (int64_t)(piece.head * group + m % group) * dim;
    for (int d = 0; d < dim; d += LANES) store(to + d, load(out + m * dim + d) / sums[m]);
  }
}

template <typename T>
void merge(const Problem& p, const std::vector<Piece>& pieces, size_t first, size_t last, const float* scratch,
           T* output) {
  const int group = p.heads / p.kv_heads, dim = p.dim;
  const int first_row = p.starts[pieces[first].request];
  const int rows = (p.stops[pieces[first].request] - first_row) * group;
  for (int m = 0; m < rows; m++) {
    float high = -INFINITY;
    for (size_t i = first; i < last; i++) high = std::max(high, scratch[pieces[i].scratch + (int64_t)rows * dim + m]);
    float weights[64], total = 0;
    const size_t count = std::min<size_t>(last - first, 64);
    for (size_t i = 0; i < count; i++) {
      const float* state = scratch + pieces[first + i].scratch + (int64_t)rows * dim;
      weights[i] = state[m] == -INFINITY ? 0.0f : std::exp2(state[m] - high);
      total += weights[i] * state[rows + m];
    }
    T* to = output + (first_row + m / group) * p.out_stride + (int64_t)(pieces[first].head * group + m % group) * dim;
    for (int d = 0; d < dim; d += LANES) {
      vec sum = {};
      for (size_t i = 0; i < count; i++)
        sum += weights[i] * load(scratch + pieces[first + i].scratch + (int64_t)m * dim + d);
      store(to + d, sum / total);
    }
  }
}

template <typename T>
void run(const Problem& p, const T* query, const T* keys, const T* values, const T* key_cache, const T* value_cache,
         T* output) {
  static thread_local std::vector<float> scratch;
  static thread_local std::vector<Piece> pieces;
  static thread_local std::vector<size_t> groups;  // first piece of each (request, head)
  const int threads = omp_get_max_threads();
  int64_t blocks = 0;
  for (int r = 0; r < p.requests; r++) blocks += (p.prefixes[r] + p.block - 1) / p.block + 1;
  const int64_t wanted = (int64_t)threads * 4;
  const int span = (int)std::max<int64_t>(1, blocks * p.kv_heads / wanted);
  pieces.clear();
  groups.clear();
  int64_t floats = 0;
  for (int r = 0; r < p.requests; r++) {
    const int count = (p.prefixes[r] + p.block - 1) / p.block;
    const int64_t rows = (int64_t)(p.stops[r] - p.starts[r]) * (p.heads / p.kv_heads);
    const int own_span = std::max(span, (count + 63) / 64);  // at most 64 pieces to merge
    for (int h = 0; h < p.kv_heads; h++) {
      groups.push_back(pieces.size());
      int b = 0;
      do {
        int end = std::min(count, b + own_span);
        pieces.push_back({r, h, b, end, end == count, b == 0 && end == count, floats});
        floats += rows * (p.dim + 2);
        b = end;
      } while (b < count);
    }
  }
  groups.push_back(pieces.size());
  if ((int64_t)scratch.size() < floats) scratch.resize(floats);
  float* results = scratch.data();
  const auto& all = pieces;
  const auto& firsts = groups;
  const int64_t total = pieces.size(), merges = groups.size() - 1;
  bool merging = false;
  for (const Piece& piece : all) merging |= !piece.alone;
  if (!merging) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < total; i++)
      run_piece(p, all[i], query, keys, values, key_cache, value_cache, results, output);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < total; i++)
      run_piece(p, all[i], query, keys, values, key_cache, value_cache, results, output);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < merges; i++)
      if (!all[firsts[i]].alone) merge(p, all, firsts[i], firsts[i + 1], results, output);
  }
}

}  // namespace

// dtype: 0 float32, 1 bfloat16, 2 float16. Returns 0, or 1 for an unknown dtype or one that the layout does not hold.
int attend(int dtype, const Problem& p, const void* query, const void* keys, const void* values,
           const void* key_cache, const void* value_cache, void* output) {
#define RUN(T) \
  run<T>(p, (const T*)query, (const T*)keys, (const T*)values, (const T*)key_cache, (const T*)value_cache, (T*)output)
  if (p.paired && dtype != 1) return 1;
  if (dtype == 0) RUN(float);
  else if (dtype == 1) RUN(bf16);
  else if (dtype == 2) RUN(fp16);
  else return 1;
#undef RUN
  return 0;
}
