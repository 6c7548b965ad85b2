// The running top-k of a row, fed with one tile of its scores at a time.
//
// A block owns a row. It reads the row's part of the tile once and appends what may still win, all
// that is not below the k-th best so far, to a list in shared memory; a list that is full is sorted
// and cut back to its k best at once, which raises the threshold. Nothing that could win is ever
// dropped, so there is no overflow to detect. Places in the list are handed out by an atomic, in
// any order: keys are unique, so the sorted list is the same whatever that order was.
#pragma once

#include "device.cuh"

namespace sae {

constexpr int kScoresPerThread = 16;  // a round; enough loads in flight to cover L2's latency
constexpr int kSelectThreads = 512;   // at most
constexpr u32 kLastLatent = 0x7fffffffu;
constexpr u32 kNan = 0x7fffffffu, kInfinity = 0x7f800000u;  // the bits of floats

// Order of keys is the selection order: NaN of any payload first, -0 equal to +0, then the latent.
__device__ inline u64 selection_key(float key, i64 latent) {
  const u32 bits = bits_of(key);
  const u32 ordered = key != key ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<u64>(ordered) << 32 | (kLastLatent - static_cast<u32>(latent));
}

__device__ inline int latent_of(u64 key) {
  return static_cast<int>(kLastLatent - static_cast<u32>(key));
}

// The bits of a key's score.
__device__ inline u32 score_of(u64 key) {
  const u32 ordered = static_cast<u32>(key >> 32);
  if (ordered == ~0u) return kNan;
  return ordered >> 31 ? ordered & 0x7fffffffu : ~ordered;
}

extern __shared__ u64 dynamic_shared[];  // the list: keys, then values

// Without a rank scale the score is in the key; with one its bits are carried beside it.
template <bool kScaled>
struct List {
  u64* keys;
  u32* values;

  __device__ void put(int at, u64 key, u32 value) const {
    keys[at] = key;
    if (kScaled) values[at] = value;
  }

  // Bitonic, descending; `size` is a power of two and the block's threads have met before.
  __device__ void sort(int size) const {
    for (int span = 2; span <= size; span *= 2) {
      for (int apart = span / 2; apart > 0; apart /= 2) {
        for (int pair = threadIdx.x; pair < size / 2; pair += blockDim.x) {
          const int low = 2 * pair - (pair & (apart - 1)), high = low + apart;
          const u64 a = keys[low], b = keys[high];
          if ((a < b) != ((low & span) == 0)) continue;
          keys[low] = b;
          keys[high] = a;
          if (kScaled) {
            const u32 value = values[low];
            values[low] = values[high];
            values[high] = value;
          }
        }
        __syncthreads();
      }
    }
  }
};

// What later scores must beat. The comparison of floats, which NaN passes on either side, only
// spares most of them their key.
struct Threshold {
  u64 key;
  float score;

  __device__ static Threshold none() { return {0, -__uint_as_float(kInfinity)}; }
  __device__ void raise(u64 kth) {
    key = kth;
    score = __uint_as_float(score_of(kth));
  }
  __device__ bool beaten_by(float ranked, i64 latent) const {
    return !(ranked < score) && selection_key(ranked, latent) > key;
  }
};

// A round of one row: every thread's next columns, four neighbours at a time.
__device__ inline int column_of(int base, int i) {
  return base + static_cast<int>((i / 4 * blockDim.x + threadIdx.x) * 4) + i % 4;
}

// Reads nothing past the end. In a whole round no branch keeps a load from the others.
__device__ inline void load_round(const float* from, int base, int end, float* out) {
  if (base + static_cast<int>(kScoresPerThread * blockDim.x) <= end) {
#pragma unroll
    for (int i = 0; i < kScoresPerThread; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + column_of(base, i));
      out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kScoresPerThread; ++i) {
    out[i] = column_of(base, i) < end ? from[column_of(base, i)] : 0.0f;
  }
}

struct ScoreTile {
  const float* scores;  // [rows, stride]; 16-byte aligned, as are its rows, the bias, the scale
  i64 stride;
  const float* bias;        // from the tile's first latent on; may be null
  const float* rank_scale;  // the same
  u64* best_keys;           // [rows, k], sorted: what one tile leaves for the next
  u32* best_values;         // [rows, k], with a rank scale
  u32* values;              // [rows, k], of the last tile; null before
  int* indices;
  i64 first;  // the tile's first latent
  i64 width;
  i64 k;
  i64 capacity;  // of the list: a power of two, at least 2 k
};

template <bool kScaled>
__device__ void write_selection(const ScoreTile& tile, const List<kScaled>& list, int kept) {
  for (int j = threadIdx.x; j < kept; j += blockDim.x) {
    const i64 at = blockIdx.x * tile.k + j;
    const u64 key = list.keys[j];
    if (tile.values) {
      tile.values[at] = kScaled ? list.values[j] : score_of(key);
      tile.indices[at] = latent_of(key);
    } else {
      tile.best_keys[at] = key;
      if (kScaled) tile.best_values[at] = list.values[j];
    }
  }
}

template <bool kScaled>
__device__ void fold_tile(const ScoreTile& tile) {
  __shared__ int listed;  // counts on past the list's end
  const int k = static_cast<int>(tile.k), capacity = static_cast<int>(tile.capacity);
  const int width = static_cast<int>(tile.width), thread = threadIdx.x, threads = blockDim.x;
  const int known = static_cast<int>(tile.first < tile.k ? tile.first : tile.k);
  const List<kScaled> list{dynamic_shared, reinterpret_cast<u32*>(dynamic_shared + capacity)};

  if (thread == 0) listed = known;
  for (int j = thread; j < known; j += threads) {
    const i64 at = blockIdx.x * tile.k + j;
    list.put(j, tile.best_keys[at], kScaled ? tile.best_values[at] : 0);
  }
  __syncthreads();
  Threshold threshold = Threshold::none();
  if (known == k) threshold.raise(list.keys[k - 1]);

  for (int base = 0; base < width; base += kScoresPerThread * threads) {
    float h[kScoresPerThread], other[kScoresPerThread], ranked[kScoresPerThread];
    load_round(tile.scores + blockIdx.x * tile.stride, base, width, h);
    if (tile.bias) {
      load_round(tile.bias, base, width, other);
#pragma unroll
      for (int i = 0; i < kScoresPerThread; ++i) h[i] = add(h[i], other[i]);
    }
    if (kScaled) load_round(tile.rank_scale, base, width, other);

    u32 pending = 0;  // bit i: score i may still win and is not in the list
#pragma unroll
    for (int i = 0; i < kScoresPerThread; ++i) {
      const int column = column_of(base, i);
      ranked[i] = kScaled ? multiply(h[i], other[i]) : h[i];
      if (column < width && threshold.beaten_by(ranked[i], tile.first + column)) pending |= 1u << i;
    }
    while (true) {
      int place = pending ? atomicAdd(&listed, __popc(pending)) : capacity;
#pragma unroll
      for (int i = 0; i < kScoresPerThread; ++i) {
        if (!(pending >> i & 1) || place >= capacity) continue;
        const u64 key = selection_key(ranked[i], tile.first + column_of(base, i));
        list.put(place++, key, bits_of(h[i]));
        pending ^= 1u << i;
      }
      if (!__syncthreads_or(static_cast<int>(pending))) break;
      if (thread == 0) listed = k;
      list.sort(capacity);
      threshold.raise(list.keys[k - 1]);
#pragma unroll
      for (int i = 0; i < kScoresPerThread; ++i) {
        const i64 latent = tile.first + column_of(base, i);
        if (!threshold.beaten_by(ranked[i], latent)) pending &= ~(1u << i);
      }
    }
  }

  // Nobody adds to the list any more: whoever is here has left the last barrier behind.
  const int n = listed;
  if (n == known && !tile.values) return;
  if (n > known) {
    int size = 1;
    while (size < n) size *= 2;
    for (int j = n + thread; j < size; j += threads) list.put(j, 0, 0);
    __syncthreads();
    list.sort(size);
  }
  write_selection(tile, list, n < k ? n : k);
}

}  // namespace sae
