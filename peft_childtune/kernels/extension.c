/* Loops over a child's entries for which torch has no fast operation on a CPU. `extension.py` compiles and calls them. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

/* ---- entries of a tensor, read or written one by one ---- */

enum { AHEAD = 16 };      /* entries between a prefetch and its use: about the cache lines that a core fetches at once */
enum { FEW = 1 << 12 };   /* entries that one thread moves before another has woken up */

INLINE int64_t position(const void *indices, int is_wide, int64_t i) {
    return is_wide ? ((const int64_t *)indices)[i] : ((const int32_t *)indices)[i];
}

INLINE int is_outside(const void *indices, int is_wide, int64_t count, int64_t numel) {
    uint64_t found = 0;
    for (int64_t i = 0; i < count; i++) found |= (uint64_t)position(indices, is_wide, i) >= (uint64_t)numel;
    return found != 0;
}

INLINE void move(char *tensor, const void *indices, int is_wide, char *entries, int64_t size, int writes, int64_t first,
                 int64_t last) {
    for (int64_t i = first; i < last; i++) {
        int64_t next = i + AHEAD < last ? i + AHEAD : i;
        __builtin_prefetch(tensor + position(indices, is_wide, next) * size, 1, 3);
        char *place = tensor + position(indices, is_wide, i) * size;
        if (writes)
            memcpy(place, entries + i * size, size);
        else
            memcpy(entries + i * size, place, size);
    }
}

/* One loop for each size of entries and positions: with constants, each is two instructions for the copy. */
#define FOR_SIZE(SIZE)                                                                                                 \
    if (size == SIZE && is_wide) move(tensor, indices, 1, entries, SIZE, writes, first, last);                         \
    if (size == SIZE && !is_wide) move(tensor, indices, 0, entries, SIZE, writes, first, last);

INLINE void move_any(char *tensor, const void *indices, int is_wide, char *entries, int64_t size, int writes,
                     int64_t first, int64_t last) {
    FOR_SIZE(2) FOR_SIZE(4) FOR_SIZE(8)
}

/* Read or write `count` entries of `size` bytes (2, 4 or 8) at flat positions (int64 if `is_wide`, else int32).
   Returns 1, with nothing done, if a position is not in [0, numel). */
EXPORT int move_entries(char *tensor, int64_t numel, const void *indices, int is_wide, int64_t count, char *entries,
                        int64_t size, int writes, int threads) {
    if (is_wide ? is_outside(indices, 1, count, numel) : is_outside(indices, 0, count, numel)) return 1;
    if (count < FEW) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int part = 0; part < threads; part++) {
        int64_t first = count * part / threads, last = count * (part + 1) / threads;
        if (writes)
            move_any(tensor, indices, is_wide, entries, size, 1, first, last);
        else
            move_any(tensor, indices, is_wide, entries, size, 0, first, last);
    }
    return 0;
}

INLINE void add(float *tensor, const void *indices, int is_wide, const float *delta, float *replaced, int64_t first,
                int64_t last) {
    for (int64_t i = first; i < last; i++) {
        int64_t next = i + AHEAD < last ? i + AHEAD : i;
        __builtin_prefetch(tensor + position(indices, is_wide, next), 1, 3);
        float *place = tensor + position(indices, is_wide, i);
        replaced[i] = *place;
        *place = replaced[i] + delta[i];
    }
}

/* Add `count` numbers to entries of a float tensor, and note what these were: in one pass, as the memory is what takes
   the time. `is_written` becomes 1. Returns 1, with nothing done, if a position is not in [0, numel). */
EXPORT int merge_entries(float *tensor, int64_t numel, const void *indices, int is_wide, int64_t count,
                         const float *delta, float *replaced, _Bool *is_written, int threads) {
    if (is_wide ? is_outside(indices, 1, count, numel) : is_outside(indices, 0, count, numel)) return 1;
    if (count < FEW) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int part = 0; part < threads; part++) {
        int64_t first = count * part / threads, last = count * (part + 1) / threads;
        if (is_wide)
            add(tensor, indices, 1, delta, replaced, first, last);
        else
            add(tensor, indices, 0, delta, replaced, first, last);
    }
    *is_written = 1;
    return 0;
}

/* ---- SDDMM: the entries of a.T @ b at a child's positions ---- */

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
enum { PAD = 16 }; /* tokens are filled up with zeros to a multiple of this */

typedef float vector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));

#ifdef __clang__
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t order __attribute__((vector_size(16)));
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (order){i, j, k, l})
#endif

typedef struct {
    const float *data; /* (tokens, width) */
    int64_t width;
} Matrix;

INLINE void transpose_quad(const float *from, int64_t stride, float *to, int64_t padded) {
    quad a = *(quad *)from, b = *(quad *)(from + stride), c = *(quad *)(from + 2 * stride),
         d = *(quad *)(from + 3 * stride);
    quad e = SHUFFLE(a, b, 0, 4, 1, 5), f = SHUFFLE(c, d, 0, 4, 1, 5);
    quad g = SHUFFLE(a, b, 2, 6, 3, 7), h = SHUFFLE(c, d, 2, 6, 3, 7);
    *(quad *)to = SHUFFLE(e, f, 0, 1, 4, 5);
    *(quad *)(to + padded) = SHUFFLE(e, f, 2, 3, 6, 7);
    *(quad *)(to + 2 * padded) = SHUFFLE(g, h, 0, 1, 4, 5);
    *(quad *)(to + 3 * padded) = SHUFFLE(g, h, 2, 3, 6, 7);
}

/* Write tokens [first, first + count) as (width, padded): the tokens of a column side by side, then zeros. */
static void transpose(const Matrix *matrix, int64_t first, int64_t count, int64_t padded, float *out) {
    const float *data = matrix->data + first * matrix->width;
    int64_t whole = matrix->width / 4 * 4, tiled = count / PAD * PAD;
    for (int64_t token = 0; token < tiled; token += PAD)
        for (int64_t column = 0; column < whole; column += 4)
            for (int64_t i = token; i < token + PAD; i += 4)
                transpose_quad(data + i * matrix->width + column, matrix->width, out + column * padded + i, padded);
    for (int64_t column = 0; column < matrix->width; column++)
        for (int64_t i = column < whole ? tiled : 0; i < padded; i++)
            out[column * padded + i] = i < count ? data[i * matrix->width + column] : 0;
}

INLINE quad fold(const vector *sum) {
    const quad *parts = (const quad *)sum;
    quad total = parts[0];
    for (int i = 1; i < LANES / 4; i++) total += parts[i];
    return total;
}

/* Add the scalar products of one column with up to four others. */
INLINE void add_products(const float *a, const float *b, const int32_t *others, int count, int64_t padded, float *sums) {
    vector sum[4] = {{0}, {0}, {0}, {0}};
    for (int64_t i = 0; i < padded; i += LANES) {
        vector x = *(const vector *)(a + i);
        for (int k = 0; k < count; k++) sum[k] += x * *(const vector *)(b + others[k] * padded + i);
    }
    quad p = fold(sum), q = fold(sum + 1), r = fold(sum + 2), s = fold(sum + 3);
    quad e = SHUFFLE(p, q, 0, 4, 2, 6) + SHUFFLE(p, q, 1, 5, 3, 7);
    quad f = SHUFFLE(r, s, 0, 4, 2, 6) + SHUFFLE(r, s, 1, 5, 3, 7);
    quad total = SHUFFLE(e, f, 0, 1, 4, 5) + SHUFFLE(e, f, 2, 3, 6, 7);
    for (int k = 0; k < count; k++) sums[k] += total[k];
}

static void add_chunk(const float *a, const float *b, int64_t padded, const int32_t *starts, const int32_t *columns,
                      int64_t rows, float *sums) {
    for (int64_t row = 0; row < rows; row++) {
        int32_t e = starts[row], end = starts[row + 1];
        for (; e + 4 <= end; e += 4) add_products(a + row * padded, b, columns + e, 4, padded, sums + e);
        for (; e < end; e++) add_products(a + row * padded, b, columns + e, 1, padded, sums + e);
    }
}

/* Write the entries of a.T @ b at the positions of a CSR matrix (`starts`, `columns`) to `out`.
   Every thread takes some chunks of tokens, transposes them into memory of its own that stays in its cache, and sums
   all entries over them. Returns 1 if there is no memory. */
EXPORT int sampled_product(const float *a, int64_t rows, const float *b, int64_t width, int64_t tokens,
                           const int32_t *starts, const int32_t *columns, float *out, int64_t chunk, int threads) {
    Matrix left = {a, rows}, right = {b, width};
    int64_t nnz = starts[rows], chunks = (tokens + chunk - 1) / chunk;
    int64_t each = ((rows + width) * chunk + nnz + PAD - 1) / PAD * PAD; /* floats of one thread */
    float *memory = aligned_alloc(64, (size_t)(each * threads) * sizeof(float));
    if (!memory) return 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int part = 0; part < threads; part++) {
            float *one = memory + part * each, *other = one + rows * chunk, *sums = other + width * chunk;
            memset(sums, 0, (size_t)nnz * sizeof(float));
            for (int64_t k = chunks * part / threads; k < chunks * (part + 1) / threads; k++) {
                int64_t first = k * chunk, count = tokens - first < chunk ? tokens - first : chunk;
                int64_t padded = (count + PAD - 1) / PAD * PAD;
                transpose(&left, first, count, padded, one);
                transpose(&right, first, count, padded, other);
                add_chunk(one, other, padded, starts, columns, rows, sums);
            }
        }
#pragma omp for schedule(static)
        for (int64_t e = 0; e < nnz; e++) {
            const float *sums = memory + (rows + width) * chunk;
            out[e] = sums[e];
            for (int part = 1; part < threads; part++) out[e] += sums[part * each + e];
        }
    }
    free(memory);
    return 0;
}
