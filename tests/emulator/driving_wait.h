// Before llmpar_cuda.cuh: the emulator's kernels run in their thread's CUDA calls alone. A thread that waits for others in pthread_cond_timedwait lets them run too, as a GPU would.
#ifndef EMULATOR_DRIVING_WAIT_H
#define EMULATOR_DRIVING_WAIT_H
#include "cuda_runtime.h"
#include <condition_variable>
#include <thread>
#include <pthread.h>
static int driving_wait(pthread_cond_t *cond, pthread_mutex_t *mutex, const struct timespec *at) {
    struct timespec until;
    if (at->tv_sec < 1000000000) return pthread_cond_timedwait(cond, mutex, at);           // of the monotonic clock: llmpar.h's threads
    (void)emulator_drive();
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += 500000;
    if (until.tv_nsec >= 1000000000) { until.tv_nsec -= 1000000000; until.tv_sec++; }
    return pthread_cond_timedwait(cond, mutex, &until);
}
#define pthread_cond_timedwait driving_wait
#endif
