// Tiles of 8-bit keys and values for the products of softmax_tiles.cuh, and single rows for those
// of softmax_plain.cuh. cp.async copies the codes, half the bytes of 16-bit tiles; threads then
// multiply them by their scales and write 16-bit tiles for the tensor cores. The products are
// exact, so everything after them is the same as for 16-bit pages.
#pragma once

#include "kv8.cuh"
#include "softmax_plain.cuh"
#include "softmax_tiles.cuh"

namespace variant::cuda {

// Codes and scale of one head of one token.
struct Kv8Row {
  const uint8_t* codes;
  const uint8_t* scale;
};

// Columns of a chunk: what a thread copies of a key, and of its value, at a time.
constexpr int kKv8Columns = 16;

// Codes of keys, codes of values, and two words of scales for each chunk.
template <class Tile>
constexpr int kScratchBytes = Tile::kKeys * (Tile::kHeadDim / kKv8Columns) * (2 * kKv8Columns + 8);

// One stage of keys and values in 16 bits, and scratch for the codes and scales of the next. A
// thread copies 16 columns of a key and of its value, kTurns times, and widens what it copied
// itself, so no barrier is needed in between and its scratch can be reused at once.
template <class Tile, class Source>
class Kv8StageLoader {
 public:
  using T = typename Tile::T;
  static constexpr int kColumns = kKv8Columns, kChunks = Tile::kHeadDim / kColumns;
  static constexpr int kCount = Tile::kKeys * kChunks;
  static constexpr int kTurns = (kCount + Tile::kThreads - 1) / Tile::kThreads;
  static_assert(Tile::kHeadDim % kColumns == 0, "a row is a whole number of chunks");
  static_assert(kTurns * 4 <= 32, "scale_offsets_ holds four bits for each turn");

  // stage: kStage elements, then kScratchBytes<Tile> bytes.
  __device__ Kv8StageLoader(T* stage, const Source& source, int last, int head_dim)
      : source_(source), last_(last), head_dim_(head_dim), stage_(stage) {}

  // Issues the copies of the first tile; the caller commits them.
  __device__ void start(int first) { fetch<false>(first); }

  // Waits for this thread's copies of the tile at `begin`, widens them, issues the copies of the
  // tile after it if there is one, and returns the stage: keys, then values. A barrier must follow.
  // kWhole: there is a tile after it, and none of its tokens are past `last`.
  template <bool kWhole>
  __device__ const T* load_stage(int begin) {
    cp_async_wait<0>();
    widen();
    if (kWhole || begin + Tile::kKeys < last_) {
      fetch<kWhole>(begin + Tile::kKeys);
      cp_async_commit();
    }
    return stage_;
  }

 private:
  __device__ uint8_t* scratch() const { return reinterpret_cast<uint8_t*>(stage_ + Tile::kStage); }
  __device__ static int chunk(int turn) {
    return turn * Tile::kThreads + static_cast<int>(threadIdx.x);
  }
  __device__ static bool has(int turn) {
    return kCount % Tile::kThreads == 0 || chunk(turn) < kCount;
  }
  __device__ uint8_t* codes_of(int chunk) const { return scratch() + chunk * kColumns; }
  __device__ uint2* scales_of(int chunk) const {
    return reinterpret_cast<uint2*>(scratch() + 2 * kCount * kColumns) + chunk;
  }

  // 16 codes of a row, fewer at its end.
  __device__ static void copy(uint8_t* to, const uint8_t* from, int left, bool wide) {
    if (wide) {
      cp_async_16(to, from, left < kColumns ? left : kColumns);
    } else {
      cp_async_8(to, from);
      cp_async_8(to + 8, from + 8, left > 8 ? 8 : 0);
    }
  }

  // Issues the copies of tokens first..first + kKeys. Tokens from `last` on are not read: they get
  // a scale of 0. Two turns at a time: all at once would not fit the registers.
  template <bool kWhole>
  __device__ void fetch(int first) {
    scale_offsets_ = 0;
#pragma unroll 2
    for (int turn = 0; turn < kTurns; ++turn) {
      if (!has(turn)) continue;
      const int i = chunk(turn), r = i / kChunks, column = i % kChunks * kColumns;
      uint2* scales = scales_of(i);
      if ((!kWhole && first + r >= last_) || column >= head_dim_) {
        *scales = make_uint2(0, 0);
        continue;
      }
      Kv8Row k, v;
      source_.locate(first + r, &k, &v);
      copy(codes_of(i), k.codes + column, head_dim_ - column, source_.wide);
      copy(codes_of(kCount + i), v.codes + column, head_dim_ - column, source_.wide);
      const uint32_t k_offset = copy_scale(&scales->x, k.scale);
      const uint32_t v_offset = copy_scale(&scales->y, v.scale);
      scale_offsets_ |= (k_offset | v_offset << 2) << turn * 4;
    }
  }

  __device__ static void widen_chunk(T* to, const uint8_t* codes, uint32_t scale) {
    uint32_t x[8] = {};
    if (scale != 0) widen_sixteen<T>(*reinterpret_cast<const uint4*>(codes), scale, x);
    uint4* out = reinterpret_cast<uint4*>(to);
    out[0] = make_uint4(x[0], x[1], x[2], x[3]);
    out[1] = make_uint4(x[4], x[5], x[6], x[7]);
  }

  // Writes the stage in the layout of StageLoader. The copies must have arrived.
  __device__ void widen() const {
#pragma unroll 2
    for (int turn = 0; turn < kTurns; ++turn) {
      if (!has(turn)) continue;
      const int i = chunk(turn);
      const uint2 scales = *scales_of(i);
      const uint32_t offsets = scale_offsets_ >> turn * 4;
      T* to = stage_ + i / kChunks * Tile::kRow + i % kChunks * kColumns;
      widen_chunk(to, codes_of(i), scale_in_word(scales.x, offsets & 3u));
      widen_chunk(to + Tile::kKeys * Tile::kRow, codes_of(kCount + i),
                  scale_in_word(scales.y, offsets >> 2 & 3u));
    }
  }

  // For each turn the offsets of the scales in their words: two bits for the key's, two for the
  // value's.
  uint32_t scale_offsets_;
  Source source_;
  int last_, head_dim_;
  T* stage_;
};

template <class T, int kHeadDim, int kKeys, int kWarps>
struct Kv8SoftmaxTile : SoftmaxTile<T, kHeadDim, kKeys, kWarps> {
  using Base = SoftmaxTile<T, kHeadDim, kKeys, kWarps>;
  template <class Tile, class Source>
  using Loader = Kv8StageLoader<Tile, Source>;
  // Of 128 columns the compiler would fit three blocks into an sm_80 multiprocessor, and spill
  // registers for it; of 96 it would give a few registers more than four blocks have.
  static constexpr int kBlocks = kWarps == 1 ? 0 : kHeadDim == 128 ? 1 : kHeadDim == 96 ? 4 : 0;
  static constexpr int kSharedBytes =
      (Base::kQueries * Base::kRow + Base::kStage) * 2 + kScratchBytes<Base>;
};

// Row of the plain products: codes, and their scale as a number. codes null: no row.
struct Kv8PlainRow {
  const uint8_t* codes = nullptr;
  float scale = 0.0f;
};
__device__ inline bool is_there(const Kv8PlainRow& row) { return row.codes != nullptr; }
__device__ inline float element_of(const Kv8PlainRow& row, int column) {
  return value_of_e4m3(row.codes[column]) * row.scale;
}

template <class T, int kColumns>
struct Kv8PlainTile : PlainTile<T, kColumns> {
  using Row = Kv8PlainRow;
  static constexpr bool kRowByRow = true;  // reading several spills registers on sm_80
  template <class Source>
  __device__ static Row key(const Source& source, int s) {
    Kv8Row k, v;
    source.locate(s, &k, &v);
    return {k.codes, value_of_scale(load_scale(k.scale))};
  }
  template <class Source>
  __device__ static Row value(const Source& source, int s) {
    Kv8Row k, v;
    source.locate(s, &k, &v);
    return {v.codes, value_of_scale(load_scale(v.scale))};
  }
};

}  // namespace variant::cuda
