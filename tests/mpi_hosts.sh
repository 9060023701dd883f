#!/bin/sh
# Two hosts of two ranks: two network namespaces with a wire between them. AllReduce: the data once each way per call, counted by the library and on the wire. golden_check's models (stress: all
# dense ones). A rank of either host is killed: those left name it, and go on without it. `mpi_hosts.sh bench [PROGRAM]`: time of the AllReduce by hosts and of the flat one instead, also at $RATE (1gbit).
# Needs root, ip, and Open MPI; where namespaces cannot be made it is skipped.
B=${B:-build}; program=$PWD/$B/test_mpi.openmpi; stress=${LLMPAR_STRESS:-0}
[ "$1" != bench ] || program=$(realpath "${2:-$B/bench_mpi.openmpi}")
skip() { echo "SKIP two hosts: $1"; echo "0 passed, 0 failed, 1 skipped"; exit 0; }
[ -x "$program" ] || skip "there is no $program (make it; needs mpicc.openmpi)"
command -v ip > /dev/null || skip "ip is not installed"
a=lpA$$; b=lpB$$; agent=$PWD/$B/mpi_agent.$$; log=$agent.log; passed=0; failed=0
clean() { ip netns del $a 2> /dev/null; ip netns del $b 2> /dev/null; rm -f "$agent" "$log"; }
trap clean EXIT
ip netns add $a 2> /dev/null && ip netns add $b 2> /dev/null || skip "no right to make network namespaces"
ip link add va$$ type veth peer name vb$$ 2> /dev/null || skip "no right to make a network device"
ip link set va$$ netns $a name eth0 2> /dev/null && ip link set vb$$ netns $b name eth0 2> /dev/null || skip "the device cannot be moved"
ip -n $a addr add 10.77.0.1/24 dev eth0; ip -n $b addr add 10.77.0.2/24 dev eth0
for ns in $a $b; do ip -n $ns link set lo up; ip -n $ns link set eth0 up; done
# What ssh would do: the host's address says which namespace, and the host has a name of its own there.
cat > "$agent" <<A
#!/bin/sh
case \$1 in 10.77.0.1) ns=$a ;; *) ns=$b ;; esac
shift
exec ip netns exec \$ns unshare --uts sh -c "hostname \$ns; \$*"
A
chmod +x "$agent"
wire() { ip netns exec $1 cat /sys/class/net/eth0/statistics/tx_bytes; }
options=
start() { # start PROGRAM...: in a subshell
    exec ip netns exec $a unshare --uts sh -c "hostname $a; exec timeout 100 mpirun.openmpi --allow-run-as-root --bind-to none $options --mca plm_rsh_agent $agent --mca btl self,vader,tcp --mca pml ob1 \
        --mca btl_tcp_if_include eth0 --mca oob_tcp_if_include eth0 --host 10.77.0.1:2,10.77.0.2:2 -np 4 $*"
}
run() { # run PROGRAM...: sets out, and the bytes that each side sent
    before_a=$(wire $a); before_b=$(wire $b)
    out=$(start "$@" 2>&1); code=$?
    sent_a=$(($(wire $a) - before_a)); sent_b=$(($(wire $b) - before_b))
}
# survivors WANT PATTERN PROGRAM...: until WANT ranks have said PATTERN. Open MPI's mpirun stays, though all ranks are through, when one of them was killed: it is ended.
survivors() {
    want=$1; pattern=$2; shift 2
    : > "$log"; start "$@" > "$log" 2>&1 &
    pid=$!
    for i in $(seq 300); do
        [ "$(grep -c "$pattern" "$log")" -lt $want ] && kill -0 $pid 2> /dev/null || break
        sleep 0.2
    done
    sleep 1                                        # the survivors leave
    kill $pid 2> /dev/null; wait $pid 2> /dev/null
    out=$(cat "$log")
    check "$want survivors say '$pattern' ($*)" "$(grep -c "$pattern" "$log")" $want
}
if [ "$1" = bench ]; then
    echo "the wire as it is:"; run $program --hosts 21; echo "$out"
    for ns in $a $b; do ip netns exec $ns tc qdisc add dev eth0 root tbf rate ${RATE:-1gbit} burst 256kb limit 32mb || exit 1; done
    echo "the wire at ${RATE:-1gbit}:"; run $program --hosts 5; echo "$out"
    exit
fi
check() { if [ "$2" = "$3" ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAIL $1: got $2, want $3"; printf '%s\n' "$out" | tail -n 10; fi; }
run $program --hosts 1; few_a=$sent_a; few_b=$sent_b
run $program --hosts 41
check "what the library counts" "$(printf '%s\n' "$out" | grep '^rank' | sort)" "rank 0: 41000000 bytes in 164 messages to other hosts, 0 wrong
rank 1: 0 bytes in 0 messages to other hosts, 0 wrong
rank 2: 41000000 bytes in 164 messages to other hosts, 0 wrong
rank 3: 0 bytes in 0 messages to other hosts, 0 wrong"
# 40 calls more are 40 MB more each way, with TCP's and IP's headers and acknowledgements at most a tenth above.
for side in "$((sent_a - few_a))" "$((sent_b - few_b))"; do
    check "bytes on the wire ($side) are 40 MB" "$([ "$side" -ge 40000000 ] && [ "$side" -le 44000000 ] && echo yes)" yes
done
models="llama-odd qwen3 llama-bias"; [ "$stress" = 0 ] || models="llama llama-odd llama3-rope llama-bf16 llama-bias llama-linear llama-mqa mistral qwen2 qwen3 shakespeare-dense"
meshes="tp=4"; [ "$stress" = 0 ] || meshes="tp=4 dp=2,tp=2 tp=2,dp=2"
for model in $models; do
    for mesh in $meshes; do
        run $PWD/$B/golden_check.openmpi $PWD/tests/golden/$model $mesh --mpi
        check "golden_check $model $mesh" "$code $(printf '%s\n' "$out" | grep -c '^max |dlogits|')" "0 1"
        [ "$stress" = 0 ] || printf '%s %s: %s\n' $model $mesh "$(printf '%s\n' "$out" | grep '^max')"
    done
done
seeds="8 6"; [ "$stress" = 0 ] || seeds=$(seq 12)                                        # they kill rank 2 and rank 0; all four
options=--enable-recovery
for seed in $seeds; do survivors 3 '^  rank [0-9]*, good: ' $PWD/$B/fault.openmpi --backend mpi --fault dead --timeout 1 --seed $seed --model $PWD/tests/golden/llama; done
survivors 2 '^rank [12] goes on as [01] of 2$' $program --lose 3,0
echo "$passed passed, $failed failed"
[ $failed = 0 ]
