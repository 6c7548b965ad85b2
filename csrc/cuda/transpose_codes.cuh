// A stable radix sort of the codes by latent, 8 bits a pass, without an atomic.
//
// The codes are cut into as many contiguous parts as there are warps. A warp counts the digits of
// its part, a scan over the warps turns the counts into places, and each warp moves its part there
// in order. Lanes that hold the same digit find each other by ballots and keep the order of lanes,
// so every place is known beforehand: the same on every run.
#pragma once

#include "device.cuh"

namespace sae {

constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kSortThreads = 256;
constexpr int kSortWarps = kSortThreads / kWarp;
constexpr int kAhead = 4;  // codes a lane has in flight

// What a pass sorts: first the codes as they are given, later what the pass before left.
struct Codes {
  const int* latents;
  const int* entries;  // null in the first pass: a code's place is its entry
  const void* values;  // in the first pass, if zeros are to be left out
  i64 value_words;     // 32-bit words of a value
  i64 n_latents;

  // Negative for what is left out: dropped entries, and what is no latent.
  __device__ int latent(i64 at) const {
    const int latent = latents[at];
    if (latent >= n_latents) return -1;
    if (!values) return latent;
    // By their bits: a comparison of floats may take subnormals for zero, and all but the sign is
    // zero in a zero only.
    const u64 bits = value_words == 2 ? static_cast<const u64*>(values)[at] << 1
                                      : static_cast<u64>(static_cast<const u32*>(values)[at]) << 33;
    return bits ? latent : -1;
  }
};

// A warp's part of n codes: whole rounds of a warp, so that only the last has idle lanes.
struct Part {
  i64 begin, end;

  __device__ Part(i64 n, i64 part, i64 parts) {
    const i64 rounds = (n + kWarp - 1) / kWarp, each = (rounds + parts - 1) / parts * kWarp;
    begin = part * each < n ? part * each : n;
    end = begin + each < n ? begin + each : n;
  }
};

// The lanes whose digit is the same, as bits; all lanes of a warp must ask.
__device__ inline u32 lanes_with(u32 digit, bool kept) {
  u32 same = __ballot_sync(kAllLanes, kept);
#pragma unroll
  for (int bit = 0; bit < kDigitBits; ++bit) {
    const bool set = digit >> bit & 1;
    const u32 votes = __ballot_sync(kAllLanes, set);
    same &= set ? votes : ~votes;
  }
  return same;
}

// Calls visit(latent, digit, its position among the codes, lanes below with the digit) for each
// kept code of a part in order, and adds its number to the counters in between.
template <class Visit>
__device__ void for_each_digit(const Codes& codes, const Part& part, i64 shift, int* counters,
                               Visit visit) {
  const int lane = threadIdx.x % kWarp;
  for (i64 round = part.begin; round < part.end; round += kAhead * kWarp) {
    int latents[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const i64 at = round + a * kWarp + lane;
      latents[a] = at < part.end ? codes.latent(at) : -1;
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const bool kept = latents[a] >= 0;
      const u32 digit = static_cast<u32>(latents[a]) >> shift & (kDigits - 1);
      const u32 same = lanes_with(digit, kept), below = same & ((1u << lane) - 1);
      if (kept) visit(latents[a], round + a * kWarp + lane, counters[digit] + __popc(below));
      __syncwarp();
      if (kept && !below) counters[digit] += __popc(same);
      __syncwarp();
    }
  }
}

// counts[digit, part]: how often a digit occurs in a part.
__device__ inline void count_digits(const Codes& codes, i64 n, i64 shift, int* counts, i64 parts) {
  __shared__ int counters[kSortWarps][kDigits];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const i64 part = static_cast<i64>(blockIdx.x) * kSortWarps + warp;
  for (int digit = lane; digit < kDigits; digit += kWarp) counters[warp][digit] = 0;
  __syncwarp();
  for_each_digit(codes, Part(n, part, parts), shift, counters[warp], [](int, i64, int) {});
  for (int digit = lane; digit < kDigits; digit += kWarp) {
    counts[digit * parts + part] = counters[warp][digit];
  }
}

// A block per digit: the counts of its parts become sums of those before; totals[digit] is the sum.
__device__ inline void sum_counts(int* counts, int* totals, i64 parts) {
  __shared__ int sums[kSortWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int* const own = counts + blockIdx.x * parts;
  const i64 each = (parts + kSortThreads - 1) / kSortThreads, begin = threadIdx.x * each;
  const i64 end = begin + each < parts ? begin + each : parts;
  int sum = 0;
  for (i64 i = begin; i < end; ++i) sum += own[i];
  int before = exclusive_sum_of_lanes(sum, lane);
  if (lane == kWarp - 1) sums[warp] = before + sum;
  __syncthreads();
  for (int other = 0; other < warp; ++other) before += sums[other];
  for (i64 i = begin; i < end; ++i) {
    const int count = own[i];
    own[i] = before;
    before += count;
  }
  if (threadIdx.x == kSortThreads - 1) totals[blockIdx.x] = before;
}

// Moves the codes of a part; `kept`, how many there are in all, is for the passes that follow.
__device__ inline void move_codes(const Codes& codes, i64 n, i64 shift, const int* counts,
                                  const int* totals, i64 parts, int* latents_out, int* entries_out,
                                  int* kept) {
  __shared__ int places[kSortWarps][kDigits];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const i64 part = static_cast<i64>(blockIdx.x) * kSortWarps + warp;
  constexpr int kEach = kDigits / kWarp;
  int sum = 0;
  for (int digit = lane * kEach; digit < (lane + 1) * kEach; ++digit) sum += totals[digit];
  int place = exclusive_sum_of_lanes(sum, lane);
  for (int digit = lane * kEach; digit < (lane + 1) * kEach; ++digit) {
    places[warp][digit] = place + counts[digit * parts + part];
    place += totals[digit];
  }
  if (!codes.entries && part == 0 && lane == kWarp - 1) *kept = place;
  __syncwarp();
  for_each_digit(codes, Part(n, part, parts), shift, places[warp], [&](int latent, i64 at, int to) {
    latents_out[to] = latent;
    entries_out[to] = codes.entries ? codes.entries[at] : static_cast<int>(at);
  });
}

// From the sorted codes: where each latent begins (a binary search, so that no thread fills a long
// gap alone) and the row of each entry.
__device__ inline void index_codes(const int* latents, const int* kept, const int* entries,
                                   const int* row_ids, i64 per_row, i64 n_latents, int* offsets,
                                   int* rows) {
  const i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int n = *kept;
  if (i < n) {
    const int entry = entries[i];
    rows[i] = row_ids ? row_ids[entry] : static_cast<int>(entry / per_row);
  }
  if (i > n_latents) return;
  int low = 0, high = n;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (latents[middle] < i) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  offsets[i] = low;
}

}  // namespace sae
