// The running top-k of one token: a short list of entries that can still win.
//
// Entries come in ascending latent order and compaction keeps that order, so among equal keys the
// earlier entry is the lower latent: exact ties cost nothing. A full list is cut back to its k
// largest keys, found by bisection on the bits of an ordered integer (a few vector compares
// instead of a branchy nth_element), and the k-th becomes the threshold that later entries must
// not be below.
#pragma once

#include <algorithm>
#include <limits>

#include "sae_kernels/simd.h"

namespace sae::SAE_ISA {

template <class T>
struct KeyOf {
  using type = uint32_t;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
};
template <class T>
using Key = typename KeyOf<T>::type;

// Unsigned order of keys is the selection order: NaN of any payload first, -0 equal to +0.
template <class T>
SAE_INLINE Key<T> ordered_key(T value) {
  constexpr Key<T> kSign = Key<T>{1} << (8 * sizeof(T) - 1);
  if (value != value) return ~Key<T>{0};
  value += T{0};  // -0 + 0 is +0
  Key<T> bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits & kSign ? ~bits : bits | kSign;
}

template <class T>
SAE_INLINE Vec<Key<T>> ordered_keys(Vec<T> value) {
  constexpr Key<T> kSign = Key<T>{1} << (8 * sizeof(T) - 1);
  const Vec<Key<T>> bits = reinterpret_cast<Vec<Key<T>>>(value + T{0});
  const Vec<Key<T>> negative = reinterpret_cast<Vec<Key<T>>>((bits & kSign) != 0);
  return (bits ^ (negative | kSign)) | reinterpret_cast<Vec<Key<T>>>(value != value);
}

template <class T>
SAE_INLINE T value_of_key(Key<T> key) {
  constexpr Key<T> kSign = Key<T>{1} << (8 * sizeof(T) - 1);
  if (key == ~Key<T>{0}) return std::numeric_limits<T>::quiet_NaN();
  const Key<T> bits = key & kSign ? key & ~kSign : ~key;
  T value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <class T>
SAE_INLINE int64_t count_at_least(const Key<T>* keys, int64_t padded, Key<T> bound) {
#if defined(__AVX512F__)
  int64_t count = 0;
  for (int64_t i = 0; i < padded; i += kLanes<Key<T>>) {
    const __m512i at = _mm512_loadu_si512(keys + i);
    if constexpr (sizeof(T) == 4) {
      count += __builtin_popcount(
          _mm512_cmpge_epu32_mask(at, _mm512_set1_epi32(static_cast<int>(bound))));
    } else {
      count += __builtin_popcount(
          _mm512_cmpge_epu64_mask(at, _mm512_set1_epi64(static_cast<int64_t>(bound))));
    }
  }
  return count;
#else
  Vec<Key<T>> sum{};
  for (int64_t i = 0; i < padded; i += kLanes<Key<T>>) {
    sum -= reinterpret_cast<Vec<Key<T>>>(load_raw(keys + i) >= bound);
  }
  return static_cast<int64_t>(horizontal_sum<Key<T>>(sum));
#endif
}

template <class T>
SAE_INLINE Key<T> largest(const Key<T>* keys, int64_t padded) {
  Vec<Key<T>> best = load_raw(keys);
  for (int64_t i = kLanes<Key<T>>; i < padded; i += kLanes<Key<T>>) {
    const Vec<Key<T>> at = load_raw(keys + i);
    best = at > best ? at : best;
  }
  Key<T> out = best[0];
  for (int i = 1; i < kLanes<Key<T>>; ++i) out = best[i] > out ? best[i] : out;
  return out;
}

template <class T>
SAE_INLINE Key<T> smallest(const Key<T>* keys, int64_t n) {
  Vec<Key<T>> best = load_raw(keys);
  for (int64_t i = kLanes<Key<T>>; i < n; i += kLanes<Key<T>>) {
    const Vec<Key<T>> at = load_raw(keys + i);
    best = at < best ? at : best;
  }
  Key<T> out = best[0];
  for (int i = 1; i < kLanes<Key<T>>; ++i) out = best[i] < out ? best[i] : out;
  return out;
}

// What ranks a score: itself, its product with a scale of its latent, or that product's magnitude.
enum class RankedBy { score, scaled, magnitude };

// The keys of scores, numbers or vectors of them.
template <RankedBy kBy, class V>
SAE_INLINE V rank_key(V h, V scale) {
  if constexpr (kBy == RankedBy::score) return h;
  const V key = h * scale;
  if constexpr (kBy == RankedBy::magnitude) return key < V{} ? -key : key;
  return key;
}

// Candidate lists of a block of tokens. `capacity` is a multiple of the vector length.
template <class T, bool kScaled>
struct Candidates {
  Key<T>* keys;                // [tokens, capacity]
  int32_t* latents;            // [tokens, capacity]
  T* values;                   // [tokens, capacity] when the key is not the value
  int32_t* counts;             // [tokens]
  T* thresholds;               // [tokens]
  int64_t capacity, limit, k;  // entries there is room for; with which a list is cut back; kept

  static size_t bytes(int64_t tokens, int64_t capacity) {
    const size_t lists = static_cast<size_t>(tokens * capacity);
    return aligned(lists * sizeof(Key<T>)) + aligned(lists * sizeof(int32_t)) +
           (kScaled ? aligned(lists * sizeof(T)) : 0) +
           aligned(static_cast<size_t>(tokens) * sizeof(int32_t)) +
           aligned(static_cast<size_t>(tokens) * sizeof(T));
  }

  Candidates(char* memory, int64_t tokens, int64_t capacity_, int64_t limit_, int64_t k_)
      : capacity(capacity_), limit(limit_), k(k_) {
    const size_t lists = static_cast<size_t>(tokens * capacity);
    keys = reinterpret_cast<Key<T>*>(memory);
    memory += aligned(lists * sizeof(Key<T>));
    latents = reinterpret_cast<int32_t*>(memory);
    memory += aligned(lists * sizeof(int32_t));
    values = reinterpret_cast<T*>(memory);
    if (kScaled) memory += aligned(lists * sizeof(T));
    counts = reinterpret_cast<int32_t*>(memory);
    memory += aligned(static_cast<size_t>(tokens) * sizeof(int32_t));
    thresholds = reinterpret_cast<T*>(memory);
  }

  static int64_t whole_vectors(int64_t n) {
    return (n + kLanes<Key<T>> - 1) / kLanes<Key<T>> * kLanes<Key<T>>;
  }

  void reset(int64_t tokens) {
    for (int64_t t = 0; t < tokens; ++t) {
      counts[t] = 0;
      thresholds[t] = -std::numeric_limits<T>::infinity();
    }
  }

  // A list that is full from the start, of entries of no latent just below the floor, that it need
  // not be filled with what has lost already.
  void start_below(int64_t token, T floor) {
    const Key<T> key = ordered_key(floor) - 1;
    std::fill_n(keys + token * capacity, k, key);
    std::fill_n(latents + token * capacity, k, -1);
    counts[token] = static_cast<int32_t>(k);
    thresholds[token] = value_of_key<T>(key);
  }

  SAE_INLINE void push(int64_t token, T key, int32_t latent, T value) {
    put(token, 0, key, latent, value);
    if (++counts[token] >= limit) compact(token);
  }

  // Writes the entry that comes i places after the last; `counts` is the caller's to move on.
  SAE_INLINE void put(int64_t token, int64_t i, T key, int32_t latent, T value) {
    const int64_t at = token * capacity + counts[token] + i;
    keys[at] = ordered_key(key);
    latents[at] = latent;
    if (kScaled) values[at] = value;
  }

  // The same for as many entries as a vector has lanes, of latents that follow each other.
  SAE_INLINE void put_vector(int64_t token, int64_t i, Vec<T> key, int32_t latent, Vec<T> value) {
    const int64_t at = token * capacity + counts[token] + i;
    const Vec<Key<T>> ordered = ordered_keys<T>(key);
    std::memcpy(keys + at, &ordered, sizeof(ordered));
    for (int lane = 0; lane < kLanes<T>; ++lane) latents[at + lane] = latent + lane;
    if (kScaled) store(values + at, value);
  }

  __attribute__((noinline)) void compact(int64_t token) {
    Key<T>* key = keys + token * capacity;
    const int64_t n = counts[token];
    const int64_t padded = whole_vectors(n);
    for (int64_t i = n; i < padded; ++i) key[i] = 0;  // below every real key
    // At least k entries are >= low, fewer than k are > high. Most often some bound in between has
    // exactly k at or above it; otherwise low ends at the k-th key itself, which has ties.
    Key<T> low = ordered_key(thresholds[token]), high = largest<T>(key, padded);
    int64_t count = n;
    while (low < high && count != k) {
      const Key<T> middle = high - (high - low) / 2;
      const int64_t above = count_at_least<T>(key, padded, middle);
      if (above >= k) {
        low = middle;
        count = above;
      } else {
        high = middle - 1;
      }
    }
    Key<T> kth = low;
    if (count == k) {
      keep_at_least(token, padded, low);
      for (int64_t i = k; i % kLanes<Key<T>>; ++i) key[i] = ~Key<T>{0};
      kth = smallest<T>(key, k);
    } else {
      keep_first(token, n, low);
    }
    counts[token] = static_cast<int32_t>(k);
    // Once the k-th is NaN nothing but NaN could matter, and the lower latent already won.
    thresholds[token] =
        kth == ~Key<T>{0} ? std::numeric_limits<T>::infinity() : value_of_key<T>(kth);
  }

  // Moves the entries with keys from the bound on to the front, in their order.
  SAE_INLINE void keep_at_least(int64_t token, int64_t padded, Key<T> bound) {
    Key<T>* key = keys + token * capacity;
    int32_t* latent = latents + token * capacity;
    T* value = values + token * capacity;
    int64_t kept = 0;
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      const __m512i least = _mm512_set1_epi32(static_cast<int>(bound));
      for (int64_t i = 0; i < padded; i += 16) {
        const __m512i at = _mm512_loadu_si512(key + i);
        const __mmask16 stays = _mm512_cmpge_epu32_mask(at, least);
        // Counted while the mask is in a register: GCC 12 spills its 16 bits and reads back 32.
        const int n = __builtin_popcount(stays);
        const auto move = [stays, i, kept](void* list) SAE_INLINE_LAMBDA {
          int32_t* p = static_cast<int32_t*>(list);
          _mm512_storeu_si512(p + kept,
                              _mm512_maskz_compress_epi32(stays, _mm512_loadu_si512(p + i)));
        };
        move(key);
        move(latent);
        if (kScaled) move(value);
        kept += n;
      }
      return;
    }
#endif
    for (int64_t i = 0; i < padded; ++i) {
      const bool stays = key[i] >= bound;
      key[kept] = key[i];
      latent[kept] = latent[i];
      if (kScaled) value[kept] = value[i];
      kept += stays;
    }
  }

  // The same down to the k-th key, which has more ties than fit: the first of them stay.
  void keep_first(int64_t token, int64_t n, Key<T> kth) {
    Key<T>* key = keys + token * capacity;
    int64_t above = 0, kept = 0;
    for (int64_t i = 0; i < n; ++i) above += key[i] > kth;
    int64_t ties = k - above;
    for (int64_t i = 0; i < n; ++i) {
      if (key[i] < kth || (key[i] == kth && ties-- <= 0)) continue;
      const int64_t from = token * capacity + i, to = token * capacity + kept++;
      keys[to] = keys[from];
      latents[to] = latents[from];
      if (kScaled) values[to] = values[from];
    }
  }

  // Up to here comparing all pairs by vectors beats sorting.
  static constexpr int64_t kRankByCounting = 128;

  struct Entry {
    Key<T> key;
    int32_t latent;
    T value;
    bool operator<(const Entry& other) const {
      return key != other.key ? key > other.key : latent < other.latent;
    }
  };

  // Writes the k winners of a token in selection order; `entries` is scratch for k of them.
  void finish(int64_t token, Entry* entries, T* out_values, int32_t* out_latents) {
    if (counts[token] > k) compact(token);
    const int64_t at = token * capacity;
    if (k <= kRankByCounting) {
      Key<T>* key = keys + at;
      for (int64_t i = k; i < capacity && i % kLanes<Key<T>>; ++i) key[i] = 0;
      const int64_t padded = whole_vectors(k);
      int64_t rank[kRankByCounting], total = 0;
      for (int64_t j = 0; j < k; ++j) {
        total += rank[j] = count_at_least<T>(key, padded, key[j]) - 1;
      }
      const bool has_ties = total != k * (k - 1) / 2;
      for (int64_t j = 0; j < k; ++j) {
        // Those above j's key and its ties, of which the earlier rank first.
        for (int64_t i = j + 1; has_ties && i < k; ++i) rank[j] -= key[i] == key[j];
        out_values[rank[j]] = kScaled ? with_one_nan(values[at + j]) : value_of_key<T>(key[j]);
        out_latents[rank[j]] = latents[at + j];
      }
      return;
    }
    take(token, entries);
    write(entries, k, out_values, out_latents);
  }

  // Copies the entries of a token, of more than k the best, and returns where they end.
  Entry* take(int64_t token, Entry* entries) {
    if (counts[token] > k) compact(token);
    const int64_t at = token * capacity;
    for (int64_t j = 0; j < counts[token]; ++j) {
      const Key<T> key = keys[at + j];
      *entries++ = {key, latents[at + j],
                    kScaled ? with_one_nan(values[at + j]) : value_of_key<T>(key)};
    }
    return entries;
  }

  // Writes k entries in selection order.
  static void write(Entry* entries, int64_t k, T* out_values, int32_t* out_latents) {
    std::sort(entries, entries + k);
    for (int64_t j = 0; j < k; ++j) {
      out_values[j] = entries[j].value;
      out_latents[j] = entries[j].latent;
    }
  }
};

}  // namespace sae::SAE_ISA
