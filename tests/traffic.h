// Compares the collectives that an engine's plans predict with those that its communicators counted. Include after llmpar.h.
#ifndef TRAFFIC_H
#define TRAFFIC_H
#include <stdio.h>

// Calls and payload bytes of this rank, per kind and axes: prediction x runs, plus what the router's choices make of the experts' AllToAll, = count, exactly. LLMPAR_MISMATCH and a text when they differ.
static inline llmpar_status check_traffic(llmpar_engine *engine, llmpar_error *err) {
    llmpar_engine_stats stats = llmpar_engine_get_stats(engine);
    for (int k = 0; k < 2 * llmpar_engine_stages(engine); k++) {
        const llmpar_engine_stage *stage = llmpar_engine_stage_at(engine, k / 2);
        const int phase = k % 2;
        llmpar_traffic want[64], got[64];
        llmpar_routed routed[16];
        int64_t runs = phase ? stats.decode_runs : stats.prefill_runs, seen = 0, planned = 0;
        int n_want = llmpar_plan_traffic(stage->plan[phase], stage->comm->rank, want, 64);
        int n_got  = llmpar_exec_traffic(stage->exec[phase], got, 64);
        int n_routed = llmpar_exec_routed(stage->exec[phase], routed, 16);
        for (int i = 0; i < n_want; i++) { want[i].calls *= runs; want[i].payload_bytes *= runs; }
        for (int i = 0; i < n_routed; i++) {
            int at = 0;
            while (at < n_want && !(want[at].kind == LLMPAR_ALL_TO_ALL && want[at].axes == routed[i].axes)) at++;
            if (at == n_want) { want[at].kind = LLMPAR_ALL_TO_ALL; want[at].axes = routed[i].axes; want[at].calls = want[at].payload_bytes = 0; n_want++; }
            want[at].calls += routed[i].calls;
            want[at].payload_bytes += routed[i].payload_bytes;
        }
        for (int i = 0; i < n_got; i++) seen += got[i].calls;
        for (int i = 0; i < n_want; i++) {
            llmpar_traffic g = { want[i].kind, want[i].axes, 0, 0 };
            for (int j = 0; j < n_got; j++) {
                if (got[j].kind != g.kind || got[j].axes != g.axes) continue;
                g.calls += got[j].calls;
                g.payload_bytes += got[j].payload_bytes;
            }
            planned += want[i].calls;
            if (g.calls == want[i].calls && g.payload_bytes == want[i].payload_bytes) continue;
            snprintf(err->text, sizeof err->text, "%s, %s over axes %x: the plan predicts %lld calls and %lld bytes in %lld runs, comm counted %lld and %lld",
                     phase ? "decode" : "prefill", llmpar_collective_name(g.kind), (unsigned)g.axes, (long long)want[i].calls,
                     (long long)want[i].payload_bytes, (long long)runs, (long long)g.calls, (long long)g.payload_bytes);
            return err->status = LLMPAR_MISMATCH;
        }
        if (seen != planned) {
            snprintf(err->text, sizeof err->text, "%s: the plan predicts %lld calls, comm counted %lld", phase ? "decode" : "prefill", (long long)planned, (long long)seen);
            return err->status = LLMPAR_MISMATCH;
        }
    }
    return LLMPAR_OK;
}
#endif
