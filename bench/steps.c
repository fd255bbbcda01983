#include "bench/bench.h"
void bench_steps(void) {}
