// Refines rows by reward heads, on all threads. steering/reward.py has the equations.
//
// Each row keeps its units u = W1 h + b1. A step along the gradient g changes h by eta g and u by
// eta W1 g. Between two steps few units pass zero (5 of 1024 in a trained head). Each of them adds
// its row of W1 to g, and its row of W1 W1^T to W1 g, times its w2, or subtracts them. So a row
// needs three products with W1 for any number of steps; the last two find W1 in the cache, if it
// fits.
//
// The order of every sum depends only on the head and the number of threads: a row's bits do not
// depend on the other rows.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include <omp.h>

namespace {

// Numbers computed by one instruction. m and d are multiples of LANES; the compiler splits a vector
// where the processor's registers are shorter.
typedef float Lanes __attribute__((vector_size(64)));
constexpr int64_t LANES = 16;
constexpr int64_t GROUP = 64;  // units that `follow_units` checks for changes at once
constexpr int64_t ROWS = 32;   // most rows of a head refined at once, to stay in the cache

// A head, laid out and padded with zeros by steering/prepared_head.py.
struct Head {
    const float *w1;         // (m, d)
    const float *gram;       // (m, m), W1 W1^T
    const float *b1;         // (m,)
    const float *w2;         // (m,)
    const float *direction;  // (d,)
    const float *along;      // (m,), W1 direction
    const float *wanted;     // (1,), positive_reward - b2: the gap is wanted - w2 . relu(u)
    int64_t m;               // a multiple of GROUP
    int64_t d;               // a multiple of LANES, the same for all heads
    int64_t rows;            // number of consecutive rows that the head refines
};

// The state of one row, or of several consecutive rows.
struct Rows {
    float *h;         // (d,)
    float *units;     // (m,)
    float *slopes;    // (m,), 1[u > 0] * w2
    float *gradient;  // (d,), W1^T slopes
    float *motion;    // (m,), W1 gradient

    Rows from(int64_t row, const Head &head) const {
        const int64_t m = row * head.m, d = row * head.d;
        return {h + d, units + m, slopes + m, gradient + d, motion + m};
    }
};

struct Range {
    int64_t first, last;
};

Lanes load(const float *from) {
    Lanes lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

template <typename Half>
Half halved(const void *numbers) {
    Half halves[2];
    std::memcpy(halves, numbers, sizeof halves);
    return halves[0] + halves[1];
}

float sum(const Lanes &lanes) {
    typedef float Eight __attribute__((vector_size(32)));
    typedef float Four __attribute__((vector_size(16)));
    const Eight eight = halved<Eight>(&lanes);
    const Four four = halved<Four>(&eight);
    return (four[0] + four[1]) + (four[2] + four[3]);
}

void add(float *to, float times, const float *from, int64_t width) {
    for (int64_t i = 0; i < width; i += LANES) {
        const Lanes lanes = load(to + i) + times * load(from + i);
        std::memcpy(to + i, &lanes, sizeof lanes);
    }
}

// Returns `value` for an active unit (above 0), else 0. NaN counts as active, and so is not hidden.
float where_active(float unit, float value) { return unit <= 0 ? 0 : value; }

template <int count>
void multiply_rows(const float *weights, int64_t d, const float *rows, float *out, int64_t stride) {
    Lanes sums[count] = {};
    for (int64_t i = 0; i < d; i += LANES) {
        const Lanes lanes = load(weights + i);
        for (int row = 0; row < count; row++) sums[row] += lanes * load(rows + row * d + i);
    }
    for (int row = 0; row < count; row++) out[row * stride] = sum(sums[row]);
}

// Computes W1 x for each row x, in a range of units: (count, d) -> (count, m).
void multiply(const Head &head, Range units, const float *rows, int64_t count, float *out) {
    const int64_t m = head.m, d = head.d;
    for (int64_t unit = units.first; unit < units.last; unit++) {
        const float *weights = head.w1 + unit * d;
        int64_t row = 0;
        for (; row + 4 <= count; row += 4)
            multiply_rows<4>(weights, d, rows + row * d, out + row * m + unit, m);
        for (; row < count; row++)
            multiply_rows<1>(weights, d, rows + row * d, out + row * m + unit, m);
    }
}

// Adds b1 to a row's units, takes the directional step, and computes the slopes after it.
void move_along_direction(const Head &head, const Rows &row, float scale) {
    add(row.units, 1, head.b1, head.m);
    Lanes reward = {};
    for (int64_t first = 0; first < head.m; first += LANES)
        for (int64_t lane = 0; lane < LANES; lane++) {
            const float unit = row.units[first + lane];
            reward[lane] += where_active(unit, unit * head.w2[first + lane]);
        }
    const float gap = *head.wanted - sum(reward);
    if (!(gap <= 0 || scale == 0)) {
        add(row.h, scale * gap, head.direction, head.d);
        add(row.units, scale * gap, head.along, head.m);
    }
    for (int64_t unit = 0; unit < head.m; unit++)
        row.slopes[unit] = where_active(row.units[unit], head.w2[unit]);
}

// Sums a range of units' shares of each row's gradient: (count, d). Goes backwards, because the
// rows of W1 that were read last are still in the cache.
void part_of_gradients(const Head &head, Range units, const Rows &rows, int64_t count, float *out) {
    std::memset(out, 0, count * head.d * sizeof *out);
    for (int64_t unit = units.last; unit-- > units.first;)
        for (int64_t row = 0; row < count; row++) {
            const float slope = rows.slopes[row * head.m + unit];
            if (slope != 0) add(out + row * head.d, slope, head.w1 + unit * head.d, head.d);
        }
}

// Brings a row's slopes, gradient and motion up to date with its units.
void follow_units(const Head &head, const Rows &row) {
    for (int64_t group = 0; group < head.m; group += GROUP) {
        int changes = 0;
        for (int64_t unit = group; unit < group + GROUP; unit++)
            changes |= where_active(row.units[unit], head.w2[unit]) != row.slopes[unit];
        for (int64_t unit = group; changes && unit < group + GROUP; unit++) {
            const float slope = where_active(row.units[unit], head.w2[unit]);
            if (slope == row.slopes[unit]) continue;
            const float change = slope - row.slopes[unit];
            add(row.gradient, change, head.w1 + unit * head.d, head.d);
            add(row.motion, change, head.gram + unit * head.m, head.m);
            row.slopes[unit] = slope;
        }
    }
}

void climb(const Head &head, const Rows &row, const float *step_sizes, int64_t steps) {
    for (int64_t step = 0; step < steps && step_sizes[step] != 0; step++) {
        if (step) follow_units(head, row);
        add(row.h, step_sizes[step], row.gradient, head.d);
        add(row.units, step_sizes[step], row.motion, head.m);
    }
}

// Refines at most ROWS rows of a head. All threads call it together; each does its share.
void refine_rows(const Head &head, const Rows &rows, int64_t count, const float *scales,
                 const float *step_sizes, int64_t steps, float *parts) {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t groups = head.m / GROUP, d = head.d;
    const Range own = {groups * thread / threads * GROUP, groups * (thread + 1) / threads * GROUP};
    multiply(head, own, rows.h, count, rows.units);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t row = 0; row < count; row++)
        move_along_direction(head, rows.from(row, head), scales[row]);
    if (steps == 0) return;
    part_of_gradients(head, own, rows, count, parts + thread * count * d);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count * d; i++) {
        rows.gradient[i] = 0;
        for (int64_t part = 0; part < threads; part++)
            rows.gradient[i] += parts[part * count * d + i];
    }
    multiply(head, own, rows.gradient, count, rows.motion);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t row = 0; row < count; row++)
        climb(head, rows.from(row, head), step_sizes + row * steps, steps);
}

}  // namespace

// Refines n rows by `count` heads, in place.
//
// h: (n, d), padded to the heads' d. scales: (n,). step_sizes: (n, steps), a row's eta for each of
// its iterations, then 0.
extern "C" void refine(const Head *heads, int64_t count, const float *scales,
                       const float *step_sizes, int64_t steps, float *h, int64_t threads) {
    const int64_t d = heads->d;
    int64_t m = 0, most = 0;
    for (int64_t place = 0; place < count; place++) {
        m = std::max(m, heads[place].m);
        most = std::max(most, std::min(ROWS, heads[place].rows));
    }
    const std::unique_ptr<float[]> memory(new float[most * (3 * m + d + threads * d)]);
    float *const units = memory.get(), *const slopes = units + most * m;
    float *const motion = slopes + most * m, *const gradient = motion + most * m;
    float *const parts = gradient + most * d;
#pragma omp parallel num_threads(threads)
    for (int64_t place = 0, row = 0; place < count; place++)
        for (const int64_t end = row + heads[place].rows; row < end;) {
            const Rows rows = {h + row * d, units, slopes, gradient, motion};
            const int64_t some = std::min(ROWS, end - row);
            refine_rows(heads[place], rows, some, scales + row, step_sizes + row * steps, steps,
                        parts);
            row += some;
        }
}
