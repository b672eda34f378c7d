// One pass over the values on the way to an order statistic.

template <class T>
Outside split(const T* x, int64_t n, T low, T high, T* found, int64_t room, int64_t* n_found) {
  int64_t below = 0, at_low = 0, at_high = 0, kept = *n_found, k = 0;
  // Stores are whole registers: `found` has that much more room.
#if VRM_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    const __m512 l = _mm512_set1_ps(low), h = _mm512_set1_ps(high);
    for (; k + 16 <= n && kept <= room; k += 16) {
      const __m512 value = _mm512_loadu_ps(x + k);
      const __mmask16 up_to = _mm512_cmp_ps_mask(value, l, _CMP_LE_OQ), from = _mm512_cmp_ps_mask(value, h, _CMP_GE_OQ);
      const __mmask16 low_ones = _mm512_cmp_ps_mask(value, l, _CMP_EQ_OQ);
      const __mmask16 high_ones = _mm512_mask_cmp_ps_mask(static_cast<__mmask16>(~low_ones), value, h, _CMP_EQ_OQ);
      const __mmask16 within = static_cast<__mmask16>(~(up_to | from));
      below += __builtin_popcount(up_to);
      if ((low_ones | high_ones) != 0) {
        below -= __builtin_popcount(low_ones);
        at_low += __builtin_popcount(low_ones);
        at_high += __builtin_popcount(high_ones);
      }
      if (within == 0) continue;
      _mm512_storeu_ps(found + kept, _mm512_maskz_compress_ps(within, value));
      kept += __builtin_popcount(within);
    }
  }
#endif
  // The counts in a loop of their own, which compilers make vectors of.
  for (int64_t end; k < n; k = end) {
    end = n - k < 1024 ? n : k + 1024;
    int32_t under = 0, up_to = 0, over = 0, from = 0;
    for (int64_t i = k; i < end; ++i) {
      under += (x[i] < low), up_to += (x[i] <= low);
      over += (x[i] > high), from += (x[i] >= high);
    }
    below += under, at_low += up_to - under;
    if (low < high) at_high += from - over;
    for (int64_t i = k; i < end; ++i) {
      if (kept <= room) found[kept] = x[i];
      kept += !((x[i] <= low) | (x[i] >= high));
    }
  }
  *n_found = kept;
  return {below, at_low, at_high};
}
