// A thread block on a CPU. Lanes are coroutines that take turns, each running from one synchronisation to the next. cpu.cpp defines these
// functions; see README.md.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace cpu {

constexpr int WARP = 32;

// Runs kernel() for `blocks` blocks of `size` threads, one block after another. Returns false after a failure, whose message is on stderr.
bool run(int blocks, int size, int shared_bytes, const std::function<void()>& kernel);

// About the lane that runs.
int thread();
int block();
int blocks();
uint8_t* shared_memory();  // at a multiple of 1024
[[noreturn]] void fail(const char* what);

// Barriers: they return once all lanes of the group have called. All but `gather` order earlier memory accesses before later ones.
void meet_block();
void meet_warp();
void meet_some(int number, int threads);
void gather();  // the warp; does not order memory accesses

// What a lane passes to the other lanes of its warp.
struct Brought { const void* pointer; uint32_t word[6]; bool flag; };
Brought* brought_by_warp();  // by lane
template <typename Bring, typename Take>
inline void together(Bring bring, Take take) {  // the second gather keeps lanes from bringing again before all have taken
    bring(brought_by_warp()[thread() % WARP]);
    gather();
    take(brought_by_warp(), thread() % WARP);
    gather();
}

// Copies 16 bytes, or zeros if `from` is null. They arrive when they are awaited.
void copy_later(void* to, const void* from);
void await_copies();

// Products are computed when they are awaited. reads(i): the address in shared memory of the i-th two bytes that the product reads, or null
// after the last.
void begin_products();
void multiply_later(std::function<void()> product, std::function<const void*(int)> reads);
void commit_products();
void await_products(int left);
void publish();  // makes the writes that this lane knows of visible to products and bulk copies

// mbarriers. The handle is the address in shared memory.
void start_barrier(uint64_t* barrier, int arrivals);
void publish_barriers();
void change_barrier(uint64_t* barrier, int arrivals, int bytes);  // bytes: expected from now on
void await_barrier(uint64_t* barrier, int parity);
void copy_in_bulk(void* to, const void* from, int bytes, uint64_t* barrier);

}  // namespace cpu
