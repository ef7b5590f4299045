// Products of sorted rows with their expert's weight on Hopper, and the weight's gradient.
//
//   product:          C[s, :] = A[s, :] . B[e]              A: rows [S, K], B: weights, C: [S, N]; s is a row of expert e
//   weight gradient:  C[e]    = sum over s of A[s]^T . B[s]   A: rows [S, M], B: gradients [S, N], C: [E, M, N]
//
// A block of threads works on one tile of C at a time: its first warpgroup loads tiles of A and B into a ring of slots in
// shared memory (tensor memory accelerator, TMA), the other two multiply them (wgmma) and store the result. A barrier
// "full" tells that a slot's bytes have arrived, a barrier "empty" that all who multiply are done with it.
//
// Python puts in front: WEIGHT_GRAD; B_ALONG_N (B's columns lie next to each other, else its rows of length K do); SUMS
// (the weight gradient has one row more, the sum of weighted gradients, stored in `weighted_sums`); DTYPE; u64; wgmma().

constexpr int TILE_M = 256, TILE_N = 192, TILE_K = 64;  // 192 divides 2880, and 256 x 192 sums are what registers hold
constexpr int STAGES = 4;
constexpr int BLOCK_M = 64, BLOCKS = TILE_M / BLOCK_M;     // the height of one wgmma; blocks of a tile
constexpr int BLOCKS_OF_WARPGROUP = BLOCKS / 2;
constexpr int BLOCK_BYTES = BLOCK_M * TILE_K * 2;          // of A; also of 64 columns of B
constexpr int A_BYTES = BLOCKS * BLOCK_BYTES, B_BYTES = TILE_N * TILE_K * 2, SLOT_BYTES = A_BYTES + B_BYTES;
constexpr int SUMS_OF_THREAD = TILE_N / 2;                 // of each block: 64 * 192 over 128 threads
constexpr int GROUP = 8;                                   // rows of tiles that share B while it is in the L2 cache
constexpr int MULTIPLYING = 256;                           // threads

typedef unsigned int u32;
struct alignas(64) TensorMap { char opaque[128]; };

// ------------------------------------------------------------------------------------------------ barriers and copies

__device__ __forceinline__ void init_barrier(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive_and_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra AGAIN;\n}" ::"r"(barrier), "r"(parity) : "memory");
}

// Copies a box of `map` that starts at column x and row y of matrix z; what lies outside of the tensor becomes 0.
__device__ __forceinline__ void load(u32 to, const TensorMap &map, u32 barrier, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
        ::"r"(to), "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier) : "memory");
}

// How wgmma finds an operand whose rows of 128 bytes are swizzled (PTX ISA, "Matrix descriptor"). `along_k`: a row holds
// 64 steps of k. Otherwise it holds 64 rows or columns of the matrix, and the next 64 are a block further.
// Bits 0 to 13: address; 16 to 29: distance of the next 64 rows or columns; 32 to 45: distance of eight rows of 128 bytes,
// all in units of 16 bytes; 62 and 63: 1 for a swizzle of 128 bytes.
__device__ __forceinline__ u64 operand(u32 address, bool along_k, int sixteen_k) {
    address += sixteen_k * (along_k ? 16 * 2 : 16 * 128);
    u64 next_64 = along_k ? 0 : BLOCK_BYTES / 16;
    return (address & 0x3ffff) >> 4 | next_64 << 16 | 1024ull / 16 << 32 | 1ull << 62;
}

// ------------------------------------------------------------------------------------------------- which tile is next

struct Tile {
    int expert, start, end;  // the expert's rows
    int height;              // rows of the expert's part of C
    int m, n;                // first row, first column in it
    int steps;               // of TILE_K
};

// From a tile's number to the tile. Numbers must come in rising order: the search goes on where it ended.
struct Tiles {
    const int *ends;
    int experts, height, width, inner;
    int expert = 0, start = 0, end = ends[0];  // where the search is, and its rows
    int before = 0;                            // tiles of the experts before

    __device__ __forceinline__ int rows() const { return WEIGHT_GRAD ? height : end - start; }
    __device__ __forceinline__ int tiles_down() const { return (rows() + SUMS + TILE_M - 1) / TILE_M; }

    __device__ __forceinline__ bool find(int number, Tile &tile) {
        int across = (width + TILE_N - 1) / TILE_N;
        while (number >= before + tiles_down() * across) {
            before += tiles_down() * across;
            if (++expert >= experts) return false;
            start = end;
            end = ends[expert];
        }
        // Down the rows of a group first, so that a tile of B serves GROUP tiles one after the other.
        int place = number - before, top = place / (GROUP * across) * GROUP, high = min(tiles_down() - top, GROUP);
        place -= top * across;
        tile = {expert, start, end, rows(), (top + place % high) * TILE_M, place / high * TILE_N};
        tile.steps = max(1, ((WEIGHT_GRAD ? end - start : inner) + TILE_K - 1) / TILE_K);  // no rows: a step of zeros
        return true;
    }
};

// The slots as one side sees them. A slot also says of which tile it is a part, or -1 at the end.
struct Ring {
    u32 slots, full, empty, numbers;
    int slot = 0;
    u32 parity = 0;

    __device__ __forceinline__ explicit Ring(u32 memory)
        : slots(memory), full(slots + STAGES * SLOT_BYTES), empty(full + STAGES * 8), numbers(empty + STAGES * 8) {}
    __device__ __forceinline__ u32 a() const { return slots + slot * SLOT_BYTES; }
    __device__ __forceinline__ u32 b() const { return a() + A_BYTES; }
    __device__ __forceinline__ void advance() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
    __device__ __forceinline__ void wait_full() const { wait(full + slot * 8, parity); }
    __device__ __forceinline__ void wait_empty() const { wait(empty + slot * 8, parity ^ 1); }
    __device__ __forceinline__ void release(int used) const {  // every warp says it for itself
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(empty + used * 8);
    }
};

// ------------------------------------------------------------------------------------------------------- loading

__device__ __forceinline__ void load_tiles(Ring ring, Tiles tiles, const TensorMap &a_map, const TensorMap &b_map,
                                           const TensorMap &weights_map, int *next_tile) {
    Tile tile;
    for (int number = blockIdx.x;;) {
        bool found = tiles.find(number, tile);
        for (int step = 0; step < (found ? tile.steps : 1); step++) {
            ring.wait_empty();
            u32 full = ring.full + ring.slot * 8;
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(ring.numbers + ring.slot * 4), "r"(found ? number : -1) : "memory");
            if (!found) {
                arrive(full);
                return;
            }
            int k = step * TILE_K;
            int blocks = min(BLOCKS, (tile.height - tile.m + BLOCK_M - 1) / BLOCK_M);
            bool sums = SUMS && blocks < BLOCKS && tile.m + blocks * BLOCK_M == tile.height;
            arrive_and_expect(full, (blocks + sums) * BLOCK_BYTES + B_BYTES);
            for (int i = 0; i < blocks; i++) {
                int m = tile.m + i * BLOCK_M;
                if (WEIGHT_GRAD) load(ring.a() + i * BLOCK_BYTES, a_map, full, m, tile.start + k, 0);
                else load(ring.a() + i * BLOCK_BYTES, a_map, full, k, tile.start + m, 0);
            }
            if (sums) load(ring.a() + blocks * BLOCK_BYTES, weights_map, full, 0, tile.start + k, 0);
            if (B_ALONG_N)
                for (int i = 0; i < TILE_N / 64; i++) {
                    int row = WEIGHT_GRAD ? tile.start + k : k, matrix = WEIGHT_GRAD ? 0 : tile.expert;
                    load(ring.b() + i * BLOCK_BYTES, b_map, full, tile.n + i * 64, row, matrix);
                }
            else load(ring.b(), b_map, full, k, tile.n, tile.expert);
            ring.advance();
        }
        // Whoever is free takes the next tile. With a fixed share of the tiles, uneven experts let the multiprocessors
        // drift apart until they no longer find each other's rows and weights in the L2 cache: one product of
        // gpt-oss-20b read 18 GB from memory instead of 5 (H100).
        number = gridDim.x + atomicAdd(next_tile, 1);
    }
}

// ------------------------------------------------------------------------------------------------------ multiplying

// Sets the rows of the slot that belong to the next expert, or to nobody and may be NaN, to 0.
__device__ __forceinline__ void clear_rows_from(u32 slot, int row) {
    for (int i = threadIdx.x % MULTIPLYING; i < SLOT_BYTES / 16; i += MULTIPLYING)
        if (i % (BLOCK_BYTES / 16) / 8 >= row)
            asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(slot + i * 16), "r"(0) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("bar.sync 1, %0;" ::"n"(MULTIPLYING) : "memory");
}

// The tile's sums over k for this warpgroup's blocks: `warpgroup` and, if there is a second one, `warpgroup` + 2. How many
// is known to the compiler, because wgmma names the registers of its sums.
template <int BLOCKS_USED>
__device__ __forceinline__ void multiply(float (&sums)[BLOCKS_OF_WARPGROUP][SUMS_OF_THREAD], Ring &ring,
                                         const Tile &tile, int warpgroup) {
    #pragma unroll
    for (int i = 0; i < BLOCKS_USED; i++)
        #pragma unroll
        for (int j = 0; j < SUMS_OF_THREAD; j++) sums[i][j] = 0.f;
    int previous = 0;
    for (int step = 0; step < tile.steps; step++) {
        ring.wait_full();
        int rows = tile.end - tile.start - step * TILE_K;
        if (WEIGHT_GRAD && rows < TILE_K) clear_rows_from(ring.a(), rows);
        if (BLOCKS_USED == 0) {
            ring.release(ring.slot);
            ring.advance();
            continue;
        }
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        #pragma unroll
        for (int k = 0; k < TILE_K / 16; k++)
            #pragma unroll
            for (int i = 0; i < BLOCKS_USED; i++) {
                u32 block = ring.a() + (i * 2 + warpgroup) * BLOCK_BYTES;
                wgmma(sums[i], operand(block, !WEIGHT_GRAD, k), operand(ring.b(), !B_ALONG_N, k));
            }
        asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (step > 0) ring.release(previous);
        previous = ring.slot;
        ring.advance();
    }
    if (BLOCKS_USED > 0) {
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        #pragma unroll
        for (int i = 0; i < BLOCKS_USED; i++)  // no instruction: nothing that reads the sums may move above the wait
            #pragma unroll
            for (int j = 0; j < SUMS_OF_THREAD; j++) asm volatile("" : "+f"(sums[i][j]));
        ring.release(previous);
    }
}

// Rounds the sums and stores them. A thread holds two columns of every eight; four threads of a row exchange theirs, so
// that each stores eight columns, 16 bytes, at once.
template <int BLOCKS_USED>
__device__ __forceinline__ void store(const float (&sums)[BLOCKS_OF_WARPGROUP][SUMS_OF_THREAD], const Tile &tile,
                                      int warpgroup, unsigned short *c, unsigned short *weighted_sums, int width) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, quarter = lane % 4;
    #pragma unroll
    for (int i = 0; i < BLOCKS_USED; i++)
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            int m = tile.m + (i * 2 + warpgroup) * BLOCK_M + warp * 16 + half * 8 + lane / 4;
            long long first = WEIGHT_GRAD ? (long long)tile.expert * tile.height : tile.start;
            unsigned short *line = c + (first + m) * width;
            if (SUMS && m == tile.height) line = weighted_sums + (long long)tile.expert * width;
            #pragma unroll
            for (int columns = 0; columns < TILE_N; columns += 32) {
                u32 pairs[4];
                #pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float *pair = &sums[i][columns / 2 + j * 4 + half * 2];
                    asm("cvt.rn." DTYPE "x2.f32 %0, %1, %2;" : "=r"(pairs[j]) : "f"(pair[1]), "f"(pair[0]));
                }
                #pragma unroll
                for (int distance = 1; distance <= 2; distance *= 2)
                    #pragma unroll
                    for (int j = 0; j < 4; j++) {
                        if (j & distance) continue;
                        bool upper = quarter & distance;
                        u32 mine = upper ? pairs[j] : pairs[j | distance];
                        u32 theirs = __shfl_xor_sync(0xffffffff, mine, distance);
                        if (upper) pairs[j] = theirs;
                        else pairs[j | distance] = theirs;
                    }
                int n = tile.n + columns + quarter * 8;
                if (m < tile.height + SUMS && n < width)
                    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(line + n), "r"(pairs[0]),
                                 "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3]) : "memory");
            }
        }
}

// ------------------------------------------------------------------------------------------------------------ kernel

// next_tile: 0 at the start. ends: [experts], where each expert's rows end. height: M, of the weight gradient only.
// inner: K, of the product only.
extern "C" __global__ void __launch_bounds__(128 + MULTIPLYING, 1)
grouped_matmul(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
               const __grid_constant__ TensorMap weights_map, unsigned short *c, unsigned short *weighted_sums,
               int *next_tile, const int *ends, int experts, int height, int width, int inner) {
    extern __shared__ char memory[];
    Ring ring(((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u);  // the swizzle repeats every 1024 bytes
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            init_barrier(ring.full + i * 8, 1);
            init_barrier(ring.empty + i * 8, MULTIPLYING / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    Tiles tiles{ends, experts, height, width, inner};
    // Through a shuffle the compiler sees that a warpgroup stays together, without which it makes wgmma wait every time.
    int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0) - 1;
    // 128 * 40 + 256 * 232 registers are the 384 * 168 that the compiler gave; for more, the block would wait for ever.
    if (warpgroup < 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) load_tiles(ring, tiles, a_map, b_map, weights_map, next_tile);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    float sums[BLOCKS_OF_WARPGROUP][SUMS_OF_THREAD];
    Tile tile;
    while (true) {
        int number;
        ring.wait_full();
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(number) : "r"(ring.numbers + ring.slot * 4) : "memory");
        number = __shfl_sync(0xffffffff, number, 0);
        if (number < 0) return;
        tiles.find(number, tile);
        // Of a tile at the end of an expert only the blocks that hold rows are multiplied.
        int below = tile.height + SUMS * BLOCK_M - tile.m - warpgroup * BLOCK_M;
        int used = __shfl_sync(0xffffffff, below > 2 * BLOCK_M ? 2 : below > 0, 0);
        if (used == 2) {
            multiply<2>(sums, ring, tile, warpgroup);
            store<2>(sums, tile, warpgroup, c, weighted_sums, width);
        } else if (used == 1) {
            multiply<1>(sums, ring, tile, warpgroup);
            store<1>(sums, tile, warpgroup, c, weighted_sums, width);
        } else {
            multiply<0>(sums, ring, tile, warpgroup);
        }
    }
}
