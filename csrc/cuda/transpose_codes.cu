#include "transpose_codes.cuh"

// In the first pass there are n codes and no entries yet; later as many as the first pass kept.
extern "C" __global__ void __launch_bounds__(sae::kSortThreads, 4)
    transpose_count(const int* latents, const int* entries, const void* values, i64 value_words,
                    i64 n, const int* kept, i64 n_latents, i64 shift, int* counts, i64 parts) {
  const sae::Codes codes{latents, entries, values, value_words, n_latents};
  sae::count_digits(codes, entries ? *kept : n, shift, counts, parts);
}

extern "C" __global__ void __launch_bounds__(sae::kSortThreads, 4)
    transpose_sum(int* counts, int* totals, i64 parts) {
  sae::sum_counts(counts, totals, parts);
}

extern "C" __global__ void __launch_bounds__(sae::kSortThreads, 4)
    transpose_move(const int* latents, const int* entries, const void* values, i64 value_words,
                   i64 n, int* kept, i64 n_latents, i64 shift, const int* counts, const int* totals,
                   i64 parts, int* latents_out, int* entries_out) {
  const sae::Codes codes{latents, entries, values, value_words, n_latents};
  sae::move_codes(codes, entries ? *kept : n, shift, counts, totals, parts, latents_out,
                  entries_out, kept);
}

extern "C" __global__ void transpose_index(const int* latents, const int* kept, const int* entries,
                                           const int* row_ids, i64 per_row, i64 n_latents,
                                           int* offsets, int* rows) {
  sae::index_codes(latents, kept, entries, row_ids, per_row, n_latents, offsets, rows);
}
