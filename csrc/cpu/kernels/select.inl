// One pass over the values on the way to an order statistic.

template <class T>
int64_t split(const T* x, int64_t n, T low, T high, T* found, int64_t room, int64_t* n_found) {
  int64_t below = 0, kept = *n_found, k = 0;
  // NaN is neither below `low` nor above `high`: it is found. Stores are whole registers: `found` has that much more
  // room.
#if VRM_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    const __m512 l = _mm512_set1_ps(low), h = _mm512_set1_ps(high);
    for (; k + 16 <= n && kept <= room; k += 16) {
      const __m512 value = _mm512_loadu_ps(x + k);
      const __mmask16 under = _mm512_cmp_ps_mask(value, l, _CMP_LT_OQ);
      const __mmask16 within = _mm512_mask_cmp_ps_mask(static_cast<__mmask16>(~under), value, h, _CMP_NGT_UQ);
      below += __builtin_popcount(under);
      if (within == 0) continue;
      _mm512_storeu_ps(found + kept, _mm512_maskz_compress_ps(within, value));
      kept += __builtin_popcount(within);
    }
  }
#endif
  for (; k < n; ++k) {
    const bool under = x[k] < low, within = !under & !(x[k] > high);
    below += under;
    if (kept <= room) found[kept] = x[k];
    kept += within;
  }
  *n_found = kept;
  return below;
}
