#!/bin/bash
# slurm.sh [CLIPS] - docs/many.md's job array on two hosts, one of which is killed in the middle.
#
# Run as root on Debian with slurm-wlm, munge and iproute2. The hosts are two network namespaces with host names of their
# own, each with a slurmd; slurmctld runs outside. Clips are short, so the jobs keep a state at every step
# (SORA_STATE_SECONDS=0). When some clips are done, all processes of one host get SIGKILL. Slurm finds the host down, requeues
# its jobs, and the other host resumes them. In the end every clip must be there, with the bytes of a single run.
set -eu
clips=${1:-24}
cd "$(dirname "$0")/.."
model=$PWD/models/demo.gguf
work=$(mktemp -d /tmp/sora-slurm.XXXXXX)
cp sora "$work" # a build in the meantime would be another program
sora=$work/sora
export SLURM_CONF=$work/slurm.conf
pids=()

finish() {
    for host in w1 w2; do
        ip netns pids sora-$host 2>/dev/null | xargs -r kill -9 2>/dev/null || :
        ip netns del sora-$host 2>/dev/null || :
    done
    [ ${#pids[@]} -eq 0 ] || kill -9 "${pids[@]}" 2>/dev/null || :
    ip link del sora-br 2>/dev/null || :
    [ -n "${KEEP-}" ] || rm -rf "$work"
}
trap finish EXIT

# What a single run gives.
mkdir "$work/single" "$work/clips"
colours=(red green blue yellow pink purple orange) shapes=(ball star heart cross square triangle)
for i in $(seq "$clips"); do
    echo "a ${colours[i % 7]} ${shapes[i % 6]} bounces on the grass"
done >"$work/prompts.txt"
options="-m $model -q -t 1 -s 48x48 -f 17"
for i in $(seq "$clips"); do
    "$sora" $options --seed "$i" -o "$work/single/$i.y4m" "$(sed -n "${i}p" "$work/prompts.txt")"
done

# The network: a bridge, and a cable to each host.
ip link add sora-br type bridge
ip addr add 10.77.0.1/24 dev sora-br
ip link set sora-br up
n=11
for host in w1 w2; do
    ip netns add sora-$host
    ip link add sora-$host type veth peer name eth0 netns sora-$host
    ip link set sora-$host master sora-br up
    ip -n sora-$host addr add 10.77.0.$n/24 dev eth0
    ip -n sora-$host link set eth0 up
    ip -n sora-$host link set lo up
    n=$((n + 1))
done

cat >"$SLURM_CONF" <<end
ClusterName=sora
SlurmctldHost=$(hostname)(10.77.0.1)
SlurmUser=root
AuthType=auth/munge
CryptoType=crypto/munge
StateSaveLocation=$work/ctld
SlurmdSpoolDir=$work/spool-%n
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd-%n.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd-%n.log
SlurmctldPort=16817
SlurmdPort=16818
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
SlurmdTimeout=10
ReturnToService=2
JobRequeue=1
KillWait=1
NodeName=w1 NodeAddr=10.77.0.11 NodeHostname=w1 CPUs=1
NodeName=w2 NodeAddr=10.77.0.12 NodeHostname=w2 CPUs=1
PartitionName=all Nodes=w1,w2 Default=YES MaxTime=INFINITE State=UP
end
printf "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n" >"$work/cgroup.conf"
mkdir "$work/ctld" "$work/spool-w1" "$work/spool-w2"

if ! munge -n >/dev/null 2>&1; then
    mkdir -p /run/munge && chown munge /run/munge
    runuser -u munge -- munged --foreground >"$work/munged.log" 2>&1 & pids+=($!)
    sleep 1
fi
slurmctld -D -c >"$work/slurmctld.out" 2>&1 & pids+=($!)
for host in w1 w2; do
    nsenter --net=/run/netns/sora-$host unshare --uts sh -c "hostname $host && exec slurmd -D" >"$work/slurmd-$host.out" 2>&1 & pids+=($!)
done
wait_for() { # wait_for SECONDS COMMAND...
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt $end ] || { echo "waited in vain for: $*"; tail -n 5 "$work"/*.out; exit 1; }
        sleep 0.3
    done
}
hosts_are_up() { [ "$(sinfo -h -N -o %T 2>/dev/null | grep -c idle)" -eq 2 ]; }
wait_for 60 hosts_are_up

# The job of docs/many.md.
cat >"$work/clips.sh" <<end
#!/bin/bash
#SBATCH --array=1-$clips
#SBATCH --cpus-per-task=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=$work/clips/%a.log
i=\$SLURM_ARRAY_TASK_ID clip=$work/clips/\$SLURM_ARRAY_TASK_ID.y4m
echo "begun on \$(hostname)"
if [ -e "\$clip.state" ]; then
    echo "resumed on \$(hostname)"
    $sora --resume -t 1 -o "\$clip"
elif [ ! -e "\$clip" ]; then
    $sora $options --seed "\$i" -o "\$clip" "\$(sed -n "\${i}p" $work/prompts.txt)"
fi
end
SORA_STATE_SECONDS=0 sbatch "$work/clips.sh"
done_clips() { find "$work/clips" -name '*.y4m' | wc -l; }
running_on_w2() { squeue -h -w w2 -t R -o %K; }
amid() { # w2 is at work, on a clip whose state is there
    [ "$(done_clips)" -ge $((clips / 4)) ] || return 1
    for i in $(running_on_w2); do [ ! -e "$work/clips/$i.y4m.state" ] || return 0; done
    return 1
}
wait_for 600 amid
echo "$(done_clips) of $clips clips are done; w2 is killed at work on: $(running_on_w2 | tr '\n' ' ')"
ip netns pids sora-w2 | xargs kill -9
all_ended() { [ -z "$(squeue -h)" ]; }
wait_for 900 all_ended

for i in $(seq "$clips"); do
    cmp "$work/single/$i.y4m" "$work/clips/$i.y4m"
    cmp "$work/single/$i.y4m.json" "$work/clips/$i.y4m.json"
done
left=$(find "$work/clips" -name '*.state*' -o -name '*.part' | wc -l)
[ "$left" -eq 0 ]
echo "$clips clips, all with the bytes of a single run; $(cat "$work"/clips/*.log | grep -c '^resumed') resumed;" \
    "$(cat "$work"/clips/*.log | grep -c '^begun on w1') jobs on w1, $(cat "$work"/clips/*.log | grep -c '^begun on w2') on w2"
