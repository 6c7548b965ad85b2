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
  Vec<Key<T>> sum{};
  for (int64_t i = 0; i < padded; i += kLanes<Key<T>>) {
    sum -= reinterpret_cast<Vec<Key<T>>>(load_raw(keys + i) >= bound);
  }
  return static_cast<int64_t>(horizontal_sum<Key<T>>(sum));
}

// Candidate lists of a block of tokens. `capacity` is a multiple of the vector length.
template <class T, bool kScaled>
struct Candidates {
  Key<T>* keys;      // [tokens, capacity]
  int32_t* latents;  // [tokens, capacity]
  T* values;         // [tokens, capacity] when the key is not the value
  int32_t* counts;   // [tokens]
  T* thresholds;     // [tokens]
  int64_t capacity, k;

  static size_t bytes(int64_t tokens, int64_t capacity) {
    const size_t lists = static_cast<size_t>(tokens * capacity);
    return aligned(lists * sizeof(Key<T>)) + aligned(lists * sizeof(int32_t)) +
           (kScaled ? aligned(lists * sizeof(T)) : 0) +
           aligned(static_cast<size_t>(tokens) * sizeof(int32_t)) +
           aligned(static_cast<size_t>(tokens) * sizeof(T));
  }

  Candidates(char* memory, int64_t tokens, int64_t capacity_, int64_t k_)
      : capacity(capacity_), k(k_) {
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

  void reset(int64_t tokens) {
    for (int64_t t = 0; t < tokens; ++t) {
      counts[t] = 0;
      thresholds[t] = -std::numeric_limits<T>::infinity();
    }
  }

  SAE_INLINE void push(int64_t token, T key, int32_t latent, T value) {
    const int64_t at = token * capacity + counts[token];
    keys[at] = ordered_key(key);
    latents[at] = latent;
    if (kScaled) values[at] = value;
    if (++counts[token] == capacity) compact(token);
  }

  __attribute__((noinline)) void compact(int64_t token) {
    Key<T>* key = keys + token * capacity;
    const int64_t n = counts[token];
    for (int64_t i = n; i < capacity; ++i) key[i] = 0;  // below every real key
    Key<T> bound = 0;
    int64_t count = n;
    for (int bit = 8 * sizeof(T) - 1; bit >= 0 && count != k; --bit) {
      const Key<T> higher = bound | (Key<T>{1} << bit);
      const int64_t above = count_at_least<T>(key, capacity, higher);
      if (above < k) continue;
      bound = higher;
      count = above;
    }
    // Stopping early leaves exactly k at or above the bound; else the bound is the k-th key itself.
    int64_t ties = n;
    if (count > k) ties = bound == ~Key<T>{0} ? k : k - count_at_least<T>(key, capacity, bound + 1);
    keep(token, n, bound, ties);
  }

  void keep(int64_t token, int64_t n, Key<T> bound, int64_t ties) {
    Key<T>* key = keys + token * capacity;
    int32_t* latent = latents + token * capacity;
    T* value = values + token * capacity;
    Key<T> smallest = ~Key<T>{0};
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      const bool tie = key[i] == bound;
      const bool stays = key[i] > bound || (tie && ties > 0);
      ties -= tie;
      const Key<T> moved = key[i];
      key[kept] = moved;
      latent[kept] = latent[i];
      if (kScaled) value[kept] = value[i];
      smallest = stays && moved < smallest ? moved : smallest;
      kept += stays;
    }
    counts[token] = static_cast<int32_t>(kept);
    // Once the k-th is NaN nothing but NaN could matter, and the lower latent already won.
    thresholds[token] = smallest == ~Key<T>{0} ? std::numeric_limits<T>::infinity()
                                               : value_of_key<T>(smallest);
  }

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
    for (int64_t j = 0; j < k; ++j) {
      const Key<T> key = keys[at + j];
      entries[j] = {key, latents[at + j], kScaled ? values[at + j] : value_of_key<T>(key)};
    }
    std::sort(entries, entries + k);
    for (int64_t j = 0; j < k; ++j) {
      out_values[j] = entries[j].value;
      out_latents[j] = entries[j].latent;
    }
  }
};

}  // namespace sae::SAE_ISA
