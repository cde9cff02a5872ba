// Rows refined by reward heads, on all threads together. steering/reward.py has the equations.
//
// Beside a row h, its units u = W1 h + b1 are kept: a step along the gradient g moves them by
// eta W1 g. From one step to the next few units pass zero (5 of 1024 in a trained head), and theirs
// are all the rows of W1, and of W1 W1^T, by which g and W1 g change. So a row takes three products
// with W1, however many the steps; the second and third find it in the cache.
//
// Every sum over a row is in an order that depends on its head and the number of threads only:
// its bits are the same whoever is beside it.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include <omp.h>

namespace {

// Numbers that are computed together. Widths are multiples of it; compilers split it where a
// processor's registers are shorter.
typedef float Lanes __attribute__((vector_size(64)));
constexpr int64_t LANES = 16;
constexpr int64_t GROUP = 64;  // of units, that are looked through together
constexpr int64_t ROWS = 32;   // of a head, that are refined together: what they need stays cached

// As steering/native_refinement.py lays it out. All widths are padded with zeros.
struct Head {
    const float *w1;         // (m, d)
    const float *gram;       // (m, m), W1 W1^T
    const float *b1;         // (m,)
    const float *w2;         // (m,)
    const float *direction;  // (d,)
    const float *along;      // (m,), W1 direction
    const float *wanted;     // (1,), what w2 . relu(u) is where the gap is closed
    int64_t units;           // m
    int64_t rows;            // that it refines, after those of the head before it
};

struct Block {
    int64_t count;
    float *h;         // (count, d)
    float *units;     // (count, m)
    float *slopes;    // (count, m), 1[u > 0] * w2
    float *gradient;  // (count, d), W1^T slopes
    float *motion;    // (count, m), W1 gradient
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

float sum(Lanes lanes) {
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

// What is not a number must show: it is not below 0.
float slope(float unit, float w2) { return unit <= 0 ? 0 : w2; }

template <int count>
void multiply_rows(const float *weights, const float *rows, int64_t d, float *out, int64_t stride) {
    Lanes sums[count] = {};
    for (int64_t i = 0; i < d; i += LANES) {
        const Lanes lanes = load(weights + i);
        for (int row = 0; row < count; row++) sums[row] += lanes * load(rows + row * d + i);
    }
    for (int row = 0; row < count; row++) out[row * stride] = sum(sums[row]);
}

// Some units of W1 rows^T: (count, d) -> (count, m).
void multiply(const Head &head, Range units, const float *rows, int64_t count, int64_t d, float *out) {
    const int64_t m = head.units;
    for (int64_t unit = units.first; unit < units.last; unit++) {
        const float *weights = head.w1 + unit * d;
        int64_t row = 0;
        for (; row + 4 <= count; row += 4)
            multiply_rows<4>(weights, rows + row * d, d, out + row * m + unit, m);
        for (; row < count; row++)
            multiply_rows<1>(weights, rows + row * d, d, out + row * m + unit, m);
    }
}

// The directional step of a row, and its slopes after it.
void move_along_direction(const Head &head, const Block &block, int64_t row, int64_t d, float scale) {
    float *units = block.units + row * head.units, *slopes = block.slopes + row * head.units;
    add(units, 1, head.b1, head.units);
    Lanes sums = {};
    for (int64_t unit = 0; unit < head.units; unit += LANES)
        for (int64_t lane = 0; lane < LANES; lane++)
            sums[lane] += units[unit + lane] * slope(units[unit + lane], head.w2[unit + lane]);
    const float gap = *head.wanted - sum(sums);
    if (!(gap <= 0 || scale == 0)) {
        add(block.h + row * d, scale * gap, head.direction, d);
        add(units, scale * gap, head.along, head.units);
    }
    for (int64_t unit = 0; unit < head.units; unit++)
        slopes[unit] = slope(units[unit], head.w2[unit]);
}

// What some units make of each row's gradient: (count, d). The last first, as they are still in the
// cache.
void gradients_of(const Head &head, Range units, const Block &block, int64_t d, float *out) {
    std::memset(out, 0, block.count * d * sizeof *out);
    for (int64_t unit = units.last; unit-- > units.first;)
        for (int64_t row = 0; row < block.count; row++) {
            const float own = block.slopes[row * head.units + unit];
            if (own != 0) add(out + row * d, own, head.w1 + unit * d, d);
        }
}

// Bring a row's gradient and motion up to date with its units.
void follow_slopes(const Head &head, const float *units, float *slopes, float *gradient, float *motion,
                   int64_t d) {
    for (int64_t group = 0; group < head.units; group += GROUP) {
        int changes = 0;
        for (int64_t unit = group; unit < group + GROUP; unit++)
            changes |= slope(units[unit], head.w2[unit]) != slopes[unit];
        for (int64_t unit = group; changes && unit < group + GROUP; unit++) {
            const float now = slope(units[unit], head.w2[unit]), change = now - slopes[unit];
            if (now == slopes[unit]) continue;
            add(gradient, change, head.w1 + unit * d, d);
            add(motion, change, head.gram + unit * head.units, head.units);
            slopes[unit] = now;
        }
    }
}

void climb(const Head &head, const Block &block, int64_t row, int64_t d, const float *step_sizes,
           int64_t steps) {
    float *units = block.units + row * head.units, *slopes = block.slopes + row * head.units;
    float *motion = block.motion + row * head.units, *gradient = block.gradient + row * d;
    for (int64_t step = 0; step < steps && step_sizes[step] != 0; step++) {
        if (step) follow_slopes(head, units, slopes, gradient, motion, d);
        add(block.h + row * d, step_sizes[step], gradient, d);
        add(units, step_sizes[step], motion, head.units);
    }
}

// One thread's part of a block. All call it together.
void refine_block(const Head &head, const Block &block, int64_t d, const float *scales,
                  const float *step_sizes, int64_t steps, float *partial) {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t groups = head.units / GROUP;
    const Range own = {groups * thread / threads * GROUP, groups * (thread + 1) / threads * GROUP};
    multiply(head, own, block.h, block.count, d, block.units);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t row = 0; row < block.count; row++)
        move_along_direction(head, block, row, d, scales[row]);
    if (steps == 0) return;
    gradients_of(head, own, block, d, partial + thread * ROWS * d);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < block.count * d; i++) {
        block.gradient[i] = 0;
        for (int64_t other = 0; other < threads; other++)
            block.gradient[i] += partial[other * ROWS * d + i];
    }
    multiply(head, own, block.gradient, block.count, d, block.motion);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t row = 0; row < block.count; row++)
        climb(head, block, row, d, step_sizes + row * steps, steps);
}

}  // namespace

// h: (n, d), refined in place. scales: (n,). step_sizes: (n, steps), 0 from where on a row has done
// its own.
extern "C" void refine(const Head *heads, int64_t count, int64_t d, const float *scales,
                       const float *step_sizes, int64_t steps, float *h, int64_t threads) {
    int64_t most = 0;
    for (int64_t place = 0; place < count; place++) most = std::max(most, heads[place].units);
    const std::unique_ptr<float[]> memory(new float[ROWS * (3 * most + d + threads * d)]);
    float *const units = memory.get(), *const slopes = units + ROWS * most;
    float *const motion = slopes + ROWS * most, *const gradient = motion + ROWS * most;
    float *const partial = gradient + ROWS * d;
#pragma omp parallel num_threads(threads)
    for (int64_t place = 0, row = 0; place < count; place++)
        for (const int64_t end = row + heads[place].rows; row < end;) {
            const int64_t rows = std::min(ROWS, end - row);
            const Block block = {rows, h + row * d, units, slopes, gradient, motion};
            refine_block(heads[place], block, d, scales + row, step_sizes + row * steps, steps, partial);
            row += rows;
        }
}
