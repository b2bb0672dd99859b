// A GPU's block on a CPU: lanes are coroutines that take turns, and run from one synchronisation to the next. Functions of cpu.cpp; see README.md.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace cpu {

constexpr int WARP = 32;

// kernel() for `blocks` blocks, one after another, of `size` threads. False where something went wrong: it is on stderr.
bool run(int blocks, int size, int shared_bytes, const std::function<void()>& kernel);

// Of the lane that runs.
int thread();
int block();
int blocks();
uint8_t* shared_memory();  // at a multiple of 1024
[[noreturn]] void fail(const char* what);

// Calls of a group of lanes that only return once all have called. All but `gather` order what was before them before what is after.
void meet_block();
void meet_warp();
void meet_some(int number, int threads);
void gather();  // of the warp: without an order of accesses to memory

// What a lane brings for the others of its warp.
struct Brought { const void* pointer; uint32_t word[6]; bool flag; };
Brought* brought_by_warp();  // by lane
template <typename Bring, typename Take>
inline void together(Bring bring, Take take) {  // nobody goes on to bring the next before all have taken
    bring(brought_by_warp()[thread() % WARP]);
    gather();
    take(brought_by_warp(), thread() % WARP);
    gather();
}

// 16 bytes from memory, zeros if from there is null: they come when they are awaited.
void copy_later(void* to, const void* from);
void await_copies();

// Products are made when they are awaited. reads(i): where in shared memory the product reads its i-th two bytes; null: it has no more.
void begin_products();
void multiply_later(std::function<void()> product, std::function<const void*(int)> reads);
void commit_products();
void await_products(int left);
void publish();  // what this lane knows to be written is there for products and bulk copies, too

// Barriers in shared memory, whose place there is the handle.
void start_barrier(uint64_t* barrier, int arrivals);
void publish_barriers();
void change_barrier(uint64_t* barrier, int arrivals, int bytes);  // arrivals; bytes that are to come
void await_barrier(uint64_t* barrier, int parity);
void copy_in_bulk(void* to, const void* from, int bytes, uint64_t* barrier);

}  // namespace cpu
