/* Multiplies rows of activations by a matrix of packed codes without ever expanding it.
 *
 *     y[a][i] = row_scale[i] * sum_j levels[j][code[i][j]] * x[a][j]                (levels)
 *     y[a][i] = sum_j levels[i][code[i][j]] * x[a][j]                           (levels of rows)
 *     y[a][i] = sum_g scale[i][g] * sum_{j in g} (code[i][j] - zero[i][g]) * x[a][j]  (row grid)
 *     y[a][i] = sum_g scale[i][g] * sum_{j in g} levels[j][code[i][j]] * x[a][j]      (group table)
 *
 * and, per reserved entry (i, j), delta * x[a][j] on top.  Codes of one column lie one after the
 * other along the rows, so that a vector holds the codes of LANES rows: they are shifted into place
 * and looked up in the column's levels, which stay in registers.  For a single activation row the
 * levels are multiplied by x[j] beforehand, and the lookups need only be added.  For many
 * activation rows what was looked up is kept for all of them.
 *
 * Columns go by in chunks: a chunk's sums stay in registers, its levels and x in the first-level
 * cache, and partial sums per chunk bound the rounding error.  A row's sums are added in the same
 * order however many threads share the rows. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#define CHUNK 32       /* columns whose sums stay in registers */
#define BATCH 4        /* activation rows that share a lookup */
#define SLAB 32        /* activation rows per pass over the codes */
#define ENTRIES_MAX 256
#define GROUP_BYTES 32 /* holds the codes of LANES rows, and what a load takes beyond them */

/* The layouts of these structures are repeated in cpu.py. */
typedef struct {
    int64_t width;          /* bits of a code */
    int64_t count;          /* columns of this width */
    int64_t stride;         /* bytes of a column's codes */
    const int64_t *columns; /* [count] places among the inputs, or NULL for all of them */
    const uint8_t *codes;   /* [count][stride] */
    const float *levels;    /* [count][2**width], or NULL on a row grid */
    int64_t first_group;    /* of its columns, where they share scales */
} Part;

typedef struct {
    int64_t rows, columns;
    int64_t part_count;
    const Part *parts;
    int64_t group_size;             /* columns that share a scale of a row; 0 without scales */
    int64_t grid_stride;            /* floats from one group's scales to the next one's */
    const float *scales, *zeros;    /* [groups][grid_stride]; zeros NULL on a group table */
    const float *row_scales;        /* [rows], or NULL */
    const int64_t *reserved_starts; /* [rows + 1] into the next two, or NULL */
    const int32_t *reserved_columns;
    const float *reserved_deltas;
    int64_t row_stride;      /* floats from the levels of one code to those of the next one */
    const float *row_levels; /* [2**width][row_stride], or NULL */
} Matrix;

/* `lookup` returns table[code] for the codes of LANES rows at `codes`; of an index only the lowest
 * bits are ever used, so a table of fewer than 16 entries is repeated up to 16. */

INLINE uint16_t load16(const uint8_t *p) { uint16_t v; memcpy(&v, p, sizeof v); return v; }
INLINE uint32_t load32(const uint8_t *p) { uint32_t v; memcpy(&v, p, sizeof v); return v; }
INLINE uint64_t load64(const uint8_t *p) { uint64_t v; memcpy(&v, p, sizeof v); return v; }

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define PATH "avx512"
#define LANES 16
#define MOST_VECTORS 8
typedef __m512 Vector;

/* Bytes that `lookup` loads. */
INLINE int load_bytes(int width) { return width > 4 ? 16 : width == 3 ? 8 : 2 * width; }

/* The codes of 16 rows, one per element, with other bits above them. */
INLINE __m512i wide_codes(int width, __m512i bytes) {
    const __m512i row = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i bit = _mm512_mullo_epi32(row, _mm512_set1_epi32(width));
    __m512i byte = _mm512_srli_epi32(bit, 3);
    __m512i pair = _mm512_add_epi32(_mm512_mullo_epi32(byte, _mm512_set1_epi32(0x0101)),
                                    _mm512_set1_epi32((int)0x80800100));
    return _mm512_srlv_epi32(_mm512_shuffle_epi8(bytes, pair),
                             _mm512_and_si512(bit, _mm512_set1_epi32(7)));
}

/* Looks 6 to 8 bits up in registers of 32 entries, and chooses by the bits above the fifth: half of
 * the time, and less, of 16 loads from memory. */
INLINE Vector wide_lookup(int width, __m512i index, const float *table) {
    Vector found[8];
    UNROLL for (int part = 0; part < 1 << (width - 5); part++)
        found[part] = _mm512_permutex2var_ps(_mm512_loadu_ps(table + 32 * part), index,
                                             _mm512_loadu_ps(table + 32 * part + 16));
    UNROLL for (int bit = 5; bit < width; bit++) {
        __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(1 << bit));
        UNROLL for (int part = 0; part < 1 << (width - 1 - bit); part++)
            found[part] = _mm512_mask_blend_ps(upper, found[2 * part], found[2 * part + 1]);
    }
    return found[0];
}

INLINE Vector lookup(int width, const uint8_t *codes, const float *table) {
    const __m512i row = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    if (width == 1)
        return _mm512_mask_blend_ps(load16(codes), _mm512_set1_ps(table[0]),
                                    _mm512_set1_ps(table[1]));
    Vector low = _mm512_loadu_ps(table);
    if (width == 2)
        return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi32((int)load32(codes)),
                                                       _mm512_slli_epi32(row, 1)), low);
    if (width == 4) { /* even elements see rows 0 to 7, odd ones 8 to 15: see `in_row_order` */
        const __m512i shift = _mm512_slli_epi32(_mm512_srli_epi32(row, 1), 2);
        return _mm512_permutexvar_ps(
            _mm512_srlv_epi32(_mm512_set1_epi64((long long)load64(codes)), shift), low);
    }
    if (width == 3)
        return _mm512_permutexvar_ps(
            wide_codes(3, _mm512_set1_epi64((long long)load64(codes))), low);
    __m512i index = wide_codes(
        width, _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)codes)));
    if (width == 5)
        return _mm512_permutex2var_ps(low, index, _mm512_loadu_ps(table + 16));
    return wide_lookup(width, index, table);
}

INLINE Vector in_row_order(int width, Vector v) {
    const __m512i order = _mm512_set_epi32(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
    return width == 4 ? _mm512_permutexvar_ps(order, v) : v;
}

#else
#define LANES 8
typedef float Vector __attribute__((vector_size(32)));
INLINE Vector in_row_order(int width, Vector v) { (void)width; return v; }

#if defined(__AVX2__)
#include <immintrin.h>
#define PATH "avx2"
#define MOST_VECTORS 8

INLINE int load_bytes(int width) { return width > 4 ? 8 : width == 3 ? 4 : width; }

INLINE Vector lookup(int width, const uint8_t *codes, const float *table) {
    const __m256i row = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    const __m256i bit = _mm256_mullo_epi32(row, _mm256_set1_epi32(width));
    if (width <= 4) {
        uint32_t word = width == 1 ? codes[0] : width == 2 ? load16(codes) : load32(codes);
        __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32((int)word), bit);
        __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
        if (width < 4)
            return low;
        __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    }
    __m256i byte = _mm256_srli_epi32(bit, 3);
    __m256i pair = _mm256_add_epi32(_mm256_mullo_epi32(byte, _mm256_set1_epi32(0x0101)),
                                    _mm256_set1_epi32((int)0x80800100));
    __m256i bytes = _mm256_set1_epi64x((long long)load64(codes));
    __m256i index = _mm256_srlv_epi32(_mm256_shuffle_epi8(bytes, pair),
                                      _mm256_and_si256(bit, _mm256_set1_epi32(7)));
    index = _mm256_and_si256(index, _mm256_set1_epi32((1 << width) - 1));
    return _mm256_i32gather_ps(table, index, 4);
}

#else
#define PATH "portable"
#define MOST_VECTORS 2

INLINE int load_bytes(int width) { return width; }

INLINE Vector lookup(int width, const uint8_t *codes, const float *table) {
    uint64_t word = 0;
    for (int byte = 0; byte < width; byte++)
        word |= (uint64_t)codes[byte] << (8 * byte);
    Vector found;
    for (int row = 0; row < LANES; row++)
        found[row] = table[(word >> (row * width)) & ((1u << width) - 1)];
    return found;
}
#endif
#endif

INLINE Vector load(const float *p) { Vector v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float *p, Vector v) { memcpy(p, &v, sizeof v); }

/* Looks the codes of LANES rows up, each in levels of its own row: levels[code * stride + row]. */
#if defined(__AVX512F__) && defined(__AVX512BW__)
INLINE Vector row_lookup(int width, const uint8_t *codes, const float *levels, int64_t stride) {
    const __m512i row = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    if (width == 1)
        return _mm512_mask_blend_ps(load16(codes), _mm512_loadu_ps(levels),
                                    _mm512_loadu_ps(levels + stride));
    __m512i index;
    if (width == 2)
        index = _mm512_srlv_epi32(_mm512_set1_epi32((int)load32(codes)), _mm512_slli_epi32(row, 1));
    else if (width <= 4)
        index = wide_codes(width, _mm512_set1_epi64((long long)load64(codes)));
    else
        index = wide_codes(
            width, _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)codes)));
    if (width <= 4) { /* chooses by bit after bit: faster than loads of 16 places */
        Vector found[8];
        const __mmask16 odd = _mm512_test_epi32_mask(index, _mm512_set1_epi32(1));
        UNROLL for (int pair = 0; pair < 1 << (width - 1); pair++)
            found[pair] = _mm512_mask_blend_ps(odd, _mm512_loadu_ps(levels + 2 * pair * stride),
                                               _mm512_loadu_ps(levels + (2 * pair + 1) * stride));
        UNROLL for (int bit = 1; bit < width; bit++) {
            const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(1 << bit));
            UNROLL for (int part = 0; part < 1 << (width - 1 - bit); part++)
                found[part] = _mm512_mask_blend_ps(upper, found[2 * part], found[2 * part + 1]);
        }
        return found[0];
    }
    index = _mm512_and_si512(index, _mm512_set1_epi32((1 << width) - 1));
    index = _mm512_add_epi32(_mm512_mullo_epi32(index, _mm512_set1_epi32((int)stride)), row);
    return _mm512_i32gather_ps(index, levels, 4);
}
#else
INLINE Vector row_lookup(int width, const uint8_t *codes, const float *levels, int64_t stride) {
    uint64_t word = 0;
    for (int byte = 0; byte < width; byte++)
        word |= (uint64_t)codes[byte] << (8 * byte);
    Vector found;
    for (int row = 0; row < LANES; row++)
        found[row] = levels[(int64_t)((word >> (row * width)) & ((1u << width) - 1)) * stride + row];
    return found;
}
#endif

typedef struct {
    int columns;
    const uint8_t *codes; /* of the first column */
    int64_t stride;
    const float *scales, *zeros;  /* of the group, or NULL */
    float total[SLAB];            /* sum of x over the columns */
    float x[SLAB / BATCH][CHUNK][BATCH];
    float tables[CHUNK * ENTRIES_MAX];
} Chunk;

INLINE int entries(int width) { return width < 4 ? 16 : 1 << width; }

/* Makes the columns' tables: levels, or the codes themselves on a row grid, times x if `scaled`. */
INLINE void fill_tables(int width, const float *levels, int scaled, Chunk *chunk) {
    const int codes = 1 << width;
    float counting[ENTRIES_MAX];
    for (int code = 0; code < codes; code++)
        counting[code] = (float)code;
    for (int c = 0; c < chunk->columns; c++) {
        float *table = chunk->tables + c * entries(width);
        float scale = scaled ? chunk->x[0][c][0] : 1.0f;
        const float *own = levels ? levels + c * codes : counting;
        if (codes >= LANES)
            for (int t = 0; t < entries(width); t += LANES)
                store(table + t, scale * load(own + t % codes));
        else
            for (int t = 0; t < entries(width); t++)
                table[t] = scale * own[t % codes];
    }
}

/* Gathers the chunk's x of n activation rows, with zeros up to a multiple of `batch`. */
INLINE void fill_x(int batch, const Matrix *m, const Part *part, int64_t first, int n,
                   const float *x, Chunk *chunk) {
    for (int a = 0; a < (n + batch - 1) / batch * batch; a++) {
        float *place = &chunk->x[a / BATCH][0][a % BATCH];
        for (int c = 0; c < chunk->columns; c++) {
            int64_t column = part->columns ? part->columns[first + c] : first + c;
            place[c * BATCH] = a < n ? x[a * m->columns + column] : 0;
        }
        if (!m->zeros)
            continue;
        chunk->total[a] = 0;
        for (int c = 0; c < chunk->columns; c++)
            chunk->total[a] += place[c * BATCH];
    }
}

/* Adds the chunk's sums of LANES rows to the outputs of one activation row. */
INLINE void add_sums(const Matrix *m, const Chunk *chunk, int a, int64_t row, Vector sums,
                     float *y) {
    if (chunk->zeros)
        sums -= load(chunk->zeros + row) * chunk->total[a];
    if (chunk->scales)
        sums *= load(chunk->scales + row);
    y += a * m->rows + row;
    if (row + LANES <= m->rows) {
        store(y, load(y) + sums);
        return;
    }
    float tail[LANES];
    store(tail, sums);
    for (int r = 0; row + r < m->rows; r++)
        y[r] += tail[r];
}

/* Sums over the chunk's columns for `vectors` * LANES rows and up to `batch` activation rows.
 * `ahead`: how far from a column's codes those lie that will be needed next. */
INLINE void tile(int width, int batch, int vectors, const Matrix *m, const Chunk *chunk,
                 const uint8_t *codes, int64_t stride, int64_t ahead, int64_t row, int a0, int n,
                 float *y) {
    Vector sums[BATCH * MOST_VECTORS];
    UNROLL for (int i = 0; i < batch * vectors; i++) sums[i] = (Vector){0};
    for (int c = 0; c < chunk->columns; c++) {
        const uint8_t *packed = codes + c * stride;
        const float *table = chunk->tables + c * entries(width);
        const float *x = chunk->x[a0 / BATCH][c];
        /* A column's next codes, and the line after: hardware does not follow this many streams. */
        __builtin_prefetch((const void *)((uintptr_t)packed + (uintptr_t)ahead));
        __builtin_prefetch((const void *)((uintptr_t)packed + (uintptr_t)ahead + 64));
        UNROLL for (int v = 0; v < vectors; v++) {
            Vector found = lookup(width, packed + v * (LANES * width / 8), table);
            if (batch == 1)
                sums[v] += found;
            else
                UNROLL for (int a = 0; a < batch; a++) sums[a * vectors + v] += x[a] * found;
        }
    }
    for (int a = 0; a < batch && a0 + a < n; a++)
        UNROLL for (int v = 0; v < vectors; v++)
            add_sums(m, chunk, a0 + a, row + v * LANES,
                     in_row_order(width, sums[a * vectors + v]), y);
}

/* Looks the codes of `vectors` * LANES rows up, column after column. */
INLINE void decode(int width, int vectors, const Chunk *chunk, const uint8_t *codes, int64_t stride,
                   int64_t ahead, float *levels) {
    for (int c = 0; c < chunk->columns; c++) {
        const uint8_t *packed = codes + c * stride;
        __builtin_prefetch((const void *)((uintptr_t)packed + (uintptr_t)ahead));
        __builtin_prefetch((const void *)((uintptr_t)packed + (uintptr_t)ahead + 64));
        UNROLL for (int v = 0; v < vectors; v++)
            store(levels + (c * vectors + v) * LANES,
                  lookup(width, packed + v * (LANES * width / 8),
                         chunk->tables + c * entries(width)));
    }
}

/* As `tile` for `BATCH` activation rows, of levels that `decode` has looked up. */
INLINE void decoded_tile(int width, int vectors, const Matrix *m, const Chunk *chunk,
                         const float *levels, int64_t row, int a0, int n, float *y) {
    Vector sums[BATCH * MOST_VECTORS];
    UNROLL for (int i = 0; i < BATCH * vectors; i++) sums[i] = (Vector){0};
    for (int c = 0; c < chunk->columns; c++) {
        const float *x = chunk->x[a0 / BATCH][c];
        UNROLL for (int v = 0; v < vectors; v++) {
            Vector found = load(levels + (c * vectors + v) * LANES);
            UNROLL for (int a = 0; a < BATCH; a++) sums[a * vectors + v] += x[a] * found;
        }
    }
    for (int a = 0; a < BATCH && a0 + a < n; a++)
        UNROLL for (int v = 0; v < vectors; v++)
            add_sums(m, chunk, a0 + a, row + v * LANES,
                     in_row_order(width, sums[a * vectors + v]), y);
}

/* Once for all widths, which differ in the order of rows at most. */
#define DECODED(vectors)                                                                         \
    static __attribute__((noinline)) void decoded_##vectors(                                     \
        int width, const Matrix *m, const Chunk *chunk, const float *levels, int64_t row, int n, \
        float *y) {                                                                              \
        for (int a = 0; a < n; a += BATCH)                                                       \
            decoded_tile(width, vectors, m, chunk, levels, row, a, n, y);                        \
    }
DECODED(1)
DECODED(2)
DECODED(4)
#define decoded_8(...) /* a single activation row alone */

/* Sums over the chunk's columns for LANES rows that have levels of their own. */
INLINE void row_tile(int width, const Matrix *m, const Chunk *chunk, const uint8_t *codes,
                     int64_t stride, int64_t row, int n, float *y) {
    const float *own = m->row_levels + row;
    if (n > 1) {
        float levels[CHUNK * LANES];
        for (int c = 0; c < chunk->columns; c++)
            store(levels + c * LANES, row_lookup(width, codes + c * stride, own, m->row_stride));
        decoded_1(0, m, chunk, levels, row, n, y); /* width 0: in the order of rows */
        return;
    }
    Vector sums = {0};
    for (int c = 0; c < chunk->columns; c++)
        sums += chunk->x[0][c][0] * row_lookup(width, codes + c * stride, own, m->row_stride);
    add_sums(m, chunk, 0, row, sums, y);
}

/* Handles `count` rows / LANES from `*group` on, as long as that many are left. */
#define TILES(vectors)                                                                           \
    for (; *group + (vectors) <= end; *group += (vectors)) {                                     \
        const uint8_t *codes = chunk->codes + *group * bytes;                                    \
        int64_t ahead = *group + (vectors) < end ? (vectors) * bytes                             \
                                                 : next - (*group - begin) * bytes;              \
        if (batch > 1 && n > (width > 5 ? 1 : 4) * batch) {                                      \
            float levels[CHUNK * (vectors) * LANES];                                             \
            decode(width, vectors, chunk, codes, chunk->stride, ahead, levels);                  \
            decoded_##vectors(width, m, chunk, levels, *group * LANES, n, y);                    \
        } else {                                                                                 \
            for (int a = 0; a < n; a += batch)                                                   \
                tile(width, batch, vectors, m, chunk, codes, chunk->stride, ahead,               \
                     *group * LANES, a, n, y);                                                   \
        }                                                                                        \
    }

INLINE void whole_groups(int width, int batch, const Matrix *m, const Chunk *chunk, int64_t *group,
                         int64_t end, int n, float *y) {
    const int bytes = LANES * width / 8;
    const int64_t begin = *group, next = CHUNK * chunk->stride;
    if (batch == 1 && MOST_VECTORS == 8)
        TILES(8)
    if (MOST_VECTORS >= 4)
        TILES(4)
    if (width <= 4)
        TILES(2)
    TILES(1)
}

INLINE void multiply_part(int width, int batch, const Matrix *m, const Part *part, int64_t begin,
                          int64_t end, int n, const float *x, float *y) {
    const int bytes = LANES * width / 8;
    /* groups before this one can be read in place, without leaving the column's codes */
    int64_t safe = part->stride < load_bytes(width)
                       ? 0 : (part->stride - load_bytes(width)) / bytes + 1;
    safe = safe < begin ? begin : safe > end ? end : safe;
    Chunk chunk;
    uint8_t copy[CHUNK][GROUP_BYTES] = {{0}};
    for (int64_t first = 0; first < part->count; first += chunk.columns) {
        int64_t last = first + CHUNK < part->count ? first + CHUNK : part->count;
        chunk.scales = chunk.zeros = NULL;
        if (m->group_size) {
            int64_t grid = first / m->group_size;
            last = last < (grid + 1) * m->group_size ? last : (grid + 1) * m->group_size;
            int64_t offset = (part->first_group + grid) * m->grid_stride;
            chunk.scales = m->scales + offset;
            chunk.zeros = m->zeros ? m->zeros + offset : NULL;
        }
        chunk.columns = (int)(last - first);
        chunk.stride = part->stride;
        chunk.codes = part->codes + first * part->stride;
        fill_x(batch, m, part, first, n, x, &chunk);
        int64_t group = begin;
        if (m->row_levels) {
            for (; group < safe; group++)
                row_tile(width, m, &chunk, chunk.codes + group * bytes, chunk.stride,
                         group * LANES, n, y);
        } else {
            fill_tables(width, part->levels ? part->levels + (first << width) : NULL, batch == 1,
                        &chunk);
            whole_groups(width, batch, m, &chunk, &group, safe, n, y);
        }
        for (; group < end; group++) {
            int64_t left = part->stride - group * bytes;
            for (int c = 0; c < chunk.columns; c++)
                memcpy(copy[c], chunk.codes + c * chunk.stride + group * bytes,
                       (size_t)(left < GROUP_BYTES ? left : GROUP_BYTES));
            if (m->row_levels)
                row_tile(width, m, &chunk, copy[0], GROUP_BYTES, group * LANES, n, y);
            for (int a = 0; a < n && !m->row_levels; a += batch)
                tile(width, batch, 1, m, &chunk, copy[0], GROUP_BYTES, 0, group * LANES, a, n, y);
        }
    }
}

#define CASE(width, batch)                                                                       \
    case width:                                                                                  \
        multiply_part(width, batch, m, part, begin, end, n, x, y);                               \
        break;
#define CASES(batch)                                                                             \
    switch (part->width) {                                                                       \
        CASE(1, batch) CASE(2, batch) CASE(3, batch) CASE(4, batch) CASE(5, batch)               \
        CASE(6, batch) CASE(7, batch) CASE(8, batch)                                             \
    }

static void multiply_one(const Matrix *m, const Part *part, int64_t begin, int64_t end, int n,
                         const float *x, float *y) { CASES(1) }

static void multiply_some(const Matrix *m, const Part *part, int64_t begin, int64_t end, int n,
                          const float *x, float *y) { CASES(BATCH) }

/* Applies row scales, then adds the reserved entries. */
static void finish_rows(const Matrix *m, int64_t begin, int64_t end, int n, const float *x,
                        float *y) {
    for (int a = 0; a < n; a++, x += m->columns, y += m->rows) {
        if (m->row_scales)
            for (int64_t row = begin; row < end; row++)
                y[row] *= m->row_scales[row];
        if (!m->reserved_starts)
            continue;
        for (int64_t row = begin; row < end; row++) {
            float sum = 0;
            for (int64_t e = m->reserved_starts[row]; e < m->reserved_starts[row + 1]; e++)
                sum += m->reserved_deltas[e] * x[m->reserved_columns[e]];
            y[row] += sum;
        }
    }
}

static void multiply_rows(const Matrix *m, int64_t n, const float *x, float *y, int64_t begin,
                          int64_t end) {
    int64_t first = begin * LANES, last = end * LANES < m->rows ? end * LANES : m->rows;
    for (int64_t a = 0; a < n; a += SLAB, x += SLAB * m->columns, y += SLAB * m->rows) {
        int slab = n - a < SLAB ? (int)(n - a) : SLAB;
        for (int k = 0; k < slab; k++)
            memset(y + k * m->rows + first, 0, (size_t)(last - first) * sizeof *y);
        for (int64_t p = 0; p < m->part_count; p++)
            (slab == 1 ? multiply_one : multiply_some)(m, m->parts + p, begin, end, slab, x, y);
        finish_rows(m, first, last, slab, x, y);
    }
}

/* x: [n][columns], y: [n][rows].  Takes at most `threads` threads, fewer for little work, and
 * returns how many. */
int64_t claq_multiply(const Matrix *m, int64_t n, const float *x, float *y, int64_t threads) {
    int64_t groups = (m->rows + LANES - 1) / LANES, taken = 1;
#ifdef _OPENMP
    int64_t useful = 1 + m->rows * m->columns * n / 65536;
    if (threads > useful)
        threads = useful;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        int64_t count = omp_get_num_threads(), share = (groups + count - 1) / count;
        if (share > 4 * MOST_VECTORS)
            share = (share + MOST_VECTORS - 1) / MOST_VECTORS * MOST_VECTORS;
        int64_t begin = share * omp_get_thread_num();
        int64_t end = begin + share < groups ? begin + share : groups;
        if (begin < end)
            multiply_rows(m, n, x, y, begin, end);
        if (begin == 0)
            taken = count;
    }
#else
    (void)threads;
    multiply_rows(m, n, x, y, 0, groups);
#endif
    return taken;
}

/* Names the instructions this was compiled for. */
const char *claq_path(void) { return PATH; }
