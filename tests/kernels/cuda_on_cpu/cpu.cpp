// See cpu.h and README.md. Kernels are compiled with -fsanitize=thread, this file without: their memory accesses call __tsan_*, below.

#include "cpu.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <ucontext.h>
#include <utility>
#include <vector>

namespace cpu {
namespace {

// Vector clocks (as in FastTrack, Flanagan and Freund, PLDI 2009). Agents are the lanes, the products of each warp, and the bulk copies of
// each mbarrier.
using Moment = uint32_t;
constexpr int BARRIERS = 16;

// For each agent: the last of its moments that is known to be over, and the last that is also visible to products and bulk copies.
struct Knowledge {
    std::vector<Moment> known, published;

    void learn(const Knowledge& other) {
        for (size_t i = 0; i < known.size(); ++i) {
            known[i] = std::max(known[i], other.known[i]);
            published[i] = std::max(published[i], other.published[i]);
        }
    }
};

// Two bytes of shared memory: the last write, and some of the reads since.
struct Cell {
    static constexpr int READERS = 4;
    uint16_t writer, reader[READERS];
    Moment written, read[READERS];
};

struct Meeting {
    int size, here = 0, round = 0;
    Knowledge told[2] = {};  // in even and odd rounds
};

struct Product {
    std::function<void()> make;
    std::function<const void*(int)> reads;
};

struct Lane {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    const int* word = nullptr;  // the lane waits until this differs from `value`
    int value = 0, stalled = 0;  // stalled: until this round
    std::vector<std::pair<void*, const void*>> copies;
    std::vector<Product> products;  // pending; one without `make` ends a group
    bool begun = false;             // begin_products was called
    bool done = false;
    Knowledge knows;
};

struct Barrier {
    const uint64_t* place;
    int arrivals, left, phase = 0, bytes = 0;
    int starter;  // the lane that initialised it
    Moment started;
    bool published = false;
    Moment copies = 0;  // its agent's moment
    Knowledge told[2];  // in even and odd phases
};

struct Event {
    int round;
    std::function<void()> what;
};

std::function<void()> kernel;
ucontext_t scheduler;
std::vector<Lane> lanes;
std::vector<Meeting> warps;
std::vector<Moment> warp_moments;  // the moments of products
std::vector<Brought> brought;
Meeting all;
std::map<int, Meeting> some;  // by number
std::vector<Barrier> barriers;
std::vector<uint8_t> memory;
std::vector<Cell> cells;
uint8_t* start_of_memory;
std::vector<Event> events;  // pending
int lane_now, block_now, round_now, grid;
bool watching = false;  // a lane runs, so accesses are checked
const char* failure = nullptr;
uint64_t drawn;

unsigned draw(unsigned below) {
    drawn = drawn * 6364136223846793005u + 1442695040888963407u;
    return static_cast<unsigned>(drawn >> 33) % below;
}
int some_rounds() { return draw(4) ? draw(8) : draw(100); }

void note(const char* what) { if (!failure) failure = what; }

Lane& lane() { return lanes[lane_now]; }
size_t agents() { return lanes.size() + warps.size() + BARRIERS; }
int agent_of_products() { return static_cast<int>(lanes.size()) + lane_now / WARP; }
int agent_of(const Barrier& barrier) { return static_cast<int>(lanes.size() + warps.size() + (&barrier - barriers.data())); }
Knowledge nothing() { return {std::vector<Moment>(agents(), 0), std::vector<Moment>(agents(), 0)}; }
// Begins a new moment of this lane: others know only what came before.
void tick() { ++lane().knows.known[lane_now]; }

void to_scheduler() {
    watching = false;
    swapcontext(&lane().context, &scheduler);
}

void wait(const int* word, int value) {
    lane().word = word, lane().value = value;
    if (*word == value) to_scheduler();
    lane().word = nullptr;
    watching = true;
}

void meet(Meeting& meeting, bool in_order) {
    watching = false;
    const int round = meeting.round;
    if (!meeting.here) meeting.told[round & 1] = nothing();
    if (in_order) meeting.told[round & 1].learn(lane().knows);
    if (++meeting.here == meeting.size) {
        meeting.here = 0;
        ++meeting.round;
    }
    wait(&meeting.round, round);
    if (in_order) lane().knows.learn(meeting.told[round & 1]), tick();
}

template <typename Do>
void each_cell(const void* at, size_t bytes, Do what) {
    const size_t first = static_cast<const uint8_t*>(at) - start_of_memory;
    if (first >= 2 * cells.size()) return;
    for (size_t i = first / 2; i < (first + bytes + 1) / 2 && i < cells.size(); ++i) what(cells[i]);
}

void keep_reader(Cell& cell, int agent, Moment moment) {
    int place = 0;
    while (place < Cell::READERS && cell.read[place] && cell.reader[place] != agent) ++place;
    if (place == Cell::READERS) place = draw(Cell::READERS);
    cell.reader[place] = agent, cell.read[place] = moment;
}

void lane_reads(const void* at, size_t bytes) {
    const std::vector<Moment>& known = lane().knows.known;
    each_cell(at, bytes, [&](Cell& cell) {
        if (known[cell.writer] < cell.written) note("a race: a lane reads what another writes");
        keep_reader(cell, lane_now, known[lane_now]);
    });
}

// writers: the moments of other agents' writes that this write is ordered after.
void writes(const void* at, size_t bytes, int agent, Moment moment, const std::vector<Moment>& writers) {
    const std::vector<Moment>& known = lane().knows.known;
    each_cell(at, bytes, [&](Cell& cell) {
        if (writers[cell.writer] < cell.written) note("a race: two write");
        for (int i = 0; i < Cell::READERS; ++i)
            if (known[cell.reader[i]] < cell.read[i]) note("a race: a write to what another reads");
        cell = {};
        cell.writer = agent, cell.written = moment;
    });
}

void lane_writes(const void* at, size_t bytes) {
    const std::vector<Moment>& known = lane().knows.known;
    writes(at, bytes, lane_now, known[lane_now], known);
}

// moment: the moment at which the products' reads are over; 0: they were only issued.
void products_read(const Product& product, Moment moment) {
    const std::vector<Moment>& published = lane().knows.published;
    for (int i = lane_now % WARP; const void* at = product.reads(i); i += WARP)  // the lanes of a warp share them
        each_cell(at, 2, [&](Cell& cell) {
            if (published[cell.writer] < cell.written) note("a race: products read what is not published");
            if (moment) keep_reader(cell, agent_of_products(), moment);
        });
}

Barrier& find(const uint64_t* place) {
    for (Barrier& barrier : barriers) {
        if (barrier.place != place) continue;
        if (lane().knows.known[barrier.starter] < barrier.started) note("a race: a barrier is used that is not known to have begun");
        if (!barrier.published) note("a barrier is used that was not published");
        return barrier;
    }
    fail("a barrier that has not begun");
}

void change(Barrier& barrier, int arrivals, int bytes) {
    if ((barrier.left -= arrivals) < 0) return note("more arrive at a barrier than it counts");
    barrier.bytes += bytes;
    if (barrier.left || barrier.bytes) return;
    barrier.left = barrier.arrivals;
    ++barrier.phase;
    barrier.told[~barrier.phase & 1] = nothing();
}

void entry() {
    watching = true;
    kernel();
    lane().done = true;
    to_scheduler();
}

void start_block(int number, int size, int shared_bytes) {
    lanes = std::vector<Lane>(size);
    brought.assign(size, {});
    warps.assign(size / WARP, Meeting{WARP});
    warp_moments.assign(size / WARP, 0);
    all = Meeting{size};
    some.clear(), events.clear(), barriers.clear();
    barriers.reserve(BARRIERS);  // lanes wait at addresses in it
    memory.assign(shared_bytes + 1024, 0xFF);  // NaN where nothing was written
    start_of_memory = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 1023) & ~uintptr_t(1023));
    cells.assign(shared_bytes / 2, {});
    round_now = 0, drawn = block_now = number;
    for (int i = 0; i < size; ++i) {
        Lane& lane = lanes[i];
        lane.knows = nothing(), lane.knows.known[i] = 1;
        lane.stack.reset(new char[1 << 17]);
        getcontext(&lane.context);
        lane.context.uc_stack.ss_sp = lane.stack.get();
        lane.context.uc_stack.ss_size = 1 << 17;
        lane.context.uc_link = nullptr;
        makecontext(&lane.context, entry, 0);
    }
}

void happen() {
    std::vector<Event> due;
    for (size_t i = 0; i < events.size();) {
        if (events[i].round > round_now) { ++i; continue; }
        due.push_back(std::move(events[i]));
        events.erase(events.begin() + i);
    }
    for (Event& event : due) event.what();
}

void run_block() {
    for (int left = static_cast<int>(lanes.size()); left && !failure;) {
        ++round_now;
        happen();
        bool any = !events.empty();
        for (Lane& lane : lanes)
            if (lane.stalled < round_now && !draw(1024)) lane.stalled = round_now + some_rounds();
        for (size_t i = 0; i < lanes.size() && !failure; ++i) {
            if (lanes[i].done || (lanes[i].word && *lanes[i].word == lanes[i].value)) continue;
            any = true;
            if (lanes[i].stalled > round_now) continue;
            lane_now = static_cast<int>(i);
            swapcontext(&scheduler, &lanes[i].context);
            left -= lanes[i].done;
        }
        if (!any) note("a deadlock: all wait for each other");
    }
}

}  // namespace

bool run(int blocks, int size, int shared_bytes, const std::function<void()>& what) {
    kernel = what, failure = nullptr, grid = blocks;
    for (int number = 0; number < grid && !failure; ++number) {
        start_block(number, size, shared_bytes);
        run_block();
    }
    if (failure) std::fprintf(stderr, "block %d, thread %d: %s\n", block_now, lane_now, failure);
    return !failure;
}

int thread() { return lane_now; }
int block() { return block_now; }
int blocks() { return grid; }
uint8_t* shared_memory() { return start_of_memory; }
void fail(const char* what) {
    note(what);
    to_scheduler();
    std::abort();  // not reached: nothing resumes the lane
}

void meet_block() { meet(all, true); }
void meet_warp() { meet(warps[lane_now / WARP], true); }
void gather() { meet(warps[lane_now / WARP], false); }
void meet_some(int number, int threads) {
    some.try_emplace(number, Meeting{threads});
    if (some[number].size != threads) fail("a barrier of several sizes");
    meet(some[number], true);
}
Brought* brought_by_warp() { return &brought[lane_now / WARP * WARP]; }

void copy_later(void* to, const void* from) {
    lane_writes(to, 16);
    std::memset(to, 0xFF, 16);
    lane().copies.push_back({to, from});
}

void await_copies() {
    for (const auto& [to, from] : lane().copies) {
        lane_writes(to, 16);
        if (from) std::memcpy(to, from, 16);
        else std::memset(to, 0, 16);
    }
    lane().copies.clear();
}

void begin_products() { lane().begun = true; }

void multiply_later(std::function<void()> make, std::function<const void*(int)> reads) {
    watching = false;
    if (!lane().begun) note("products without wgmma.fence before them");
    lane().products.push_back({std::move(make), std::move(reads)});
    products_read(lane().products.back(), 0);
    watching = true;
}

void commit_products() {
    lane().products.push_back({});
    lane().begun = false;
}

void await_products(int left) {
    watching = false;
    std::vector<Product>& products = lane().products;
    size_t done = products.size();
    for (int groups = 0; done > 0; --done)
        if (!products[done - 1].make && groups++ == left) break;
    const Moment moment = warp_moments[lane_now / WARP] + 1;
    for (size_t i = 0; i < done; ++i)
        if (products[i].make) {
            products_read(products[i], moment);
            products[i].make();
        }
    products.erase(products.begin(), products.begin() + done);
    gather();  // .sync: no lane continues before all have waited
    lane().knows.known[agent_of_products()] = warp_moments[lane_now / WARP] = moment;
    gather();
}

void publish() {
    lane().knows.published = lane().knows.known;
    tick();
}

void start_barrier(uint64_t* place, int arrivals) {
    lane_writes(place, 8);
    if (barriers.size() == BARRIERS) fail("more barriers than the emulator has agents for");
    barriers.push_back({place, arrivals, arrivals});
    Barrier& barrier = barriers.back();
    barrier.starter = lane_now, barrier.started = lane().knows.known[lane_now];
    for (Knowledge& told : barrier.told) told = nothing();
}

void publish_barriers() {
    for (Barrier& barrier : barriers) barrier.published = true;
}

void change_barrier(uint64_t* place, int arrivals, int bytes) {
    Barrier& barrier = find(place);
    if (arrivals) barrier.told[~barrier.phase & 1].learn(lane().knows), tick();
    change(barrier, arrivals, bytes);
}

void await_barrier(uint64_t* place, int parity) {
    watching = false;
    Barrier& barrier = find(place);
    while (barrier.phase % 2 == parity) wait(&barrier.phase, barrier.phase), watching = false;
    lane().knows.learn(barrier.told[barrier.phase & 1]);
    tick();
    watching = true;
}

void copy_in_bulk(void* to, const void* from, int bytes, uint64_t* place) {
    Barrier& barrier = find(place);
    const Moment moment = ++barrier.copies;
    const int agent = agent_of(barrier);
    writes(to, bytes, agent, moment, lane().knows.published);
    std::memset(to, 0xFF, bytes);
    events.push_back({round_now + some_rounds(), [=, &barrier] {
        std::memcpy(to, from, bytes);
        Knowledge& told = barrier.told[~barrier.phase & 1];
        told.known[agent] = told.published[agent] = moment;
        change(barrier, 0, -bytes);
    }});
}

}  // namespace cpu

#define READS(name, bytes) extern "C" void __tsan_##name(void* at) { if (cpu::watching) cpu::lane_reads(at, bytes); }
#define WRITES(name, bytes) extern "C" void __tsan_##name(void* at) { if (cpu::watching) cpu::lane_writes(at, bytes); }
#define SIZES(DO, name) DO(name##1, 1) DO(name##2, 2) DO(name##4, 4) DO(name##8, 8) DO(name##16, 16)
SIZES(READS, read)
SIZES(WRITES, write)
SIZES(READS, unaligned_read)
SIZES(WRITES, unaligned_write)
extern "C" void __tsan_read_range(void* at, size_t bytes) { if (cpu::watching) cpu::lane_reads(at, bytes); }
extern "C" void __tsan_write_range(void* at, size_t bytes) { if (cpu::watching) cpu::lane_writes(at, bytes); }
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
