#!/usr/bin/env bash
# A throw-away Slurm cluster on this machine, for tests: one controller and a few nodes, all of it real, in one folder.
#
#   tests/slurm/cluster.sh start DIR         starts it and waits until its nodes are idle
#   tests/slurm/cluster.sh start-node DIR N  starts node N again, after it was killed
#   tests/slurm/cluster.sh stop DIR          ends jobs and daemons
#
# Clients find it by SLURM_CONF=DIR/slurm.conf. The partitions `low` and `high` share the nodes: a job in `high` takes
# them from one in `low`, which gets its own signal first and is put back into the queue. Needs root, and Debian's
# slurmctld, slurmd and slurm-client (munge comes with them). Outside of DIR nothing is changed: the names of the nodes
# are made known in a mount namespace of the daemons, and all of them listen on 127.0.0.1 alone.
set -euo pipefail

command=${1:?start, start-node or stop}
folder=$(realpath -m "${2:?a folder}")
readonly command folder
readonly num_nodes=${SLURM_TEST_NODES:-2}
readonly grace_seconds=40 # between the signal and the end of a job that is preempted
export SLURM_CONF=$folder/slurm.conf

# The first of num_nodes + 1 ports in a row that nobody listens on.
free_ports() {
	local attempt first port
	for attempt in {1..100}; do
		first=$((20000 + (RANDOM + attempt) % 10000))
		for ((port = first; port <= first + num_nodes; port++)); do
			! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || continue 2
		done
		echo "$first"
		return
	done
	echo "no free ports between 20000 and 30000" >&2
	return 1
}

write_configuration() {
	local host port node cpus
	host=$(hostname)
	port=$(free_ports)
	cpus=2 # so many jobs at a time, with a task on each node; they share what the machine has
	mkdir -p "$folder"/{state,log,run}
	echo "CgroupPlugin=disabled" >"$folder/cgroup.conf"
	(umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
	{ cat /etc/hosts && echo "127.0.0.1 $(seq -s' ' -f 'node%g' "$num_nodes")"; } >"$folder/hosts"
	cat >"$SLURM_CONF" <<-CONF
		ClusterName=throwaway
		SlurmctldHost=$host(127.0.0.1)
		SlurmctldPort=$port
		SlurmUser=root
		SlurmdUser=root
		AuthType=auth/munge
		CredType=cred/munge
		AuthInfo=socket=$folder/run/munge.socket,cred_expire=5
		CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
		MpiDefault=none
		ProctrackType=proctrack/linuxproc
		TaskPlugin=task/none
		JobAcctGatherType=jobacct_gather/none
		AccountingStorageType=accounting_storage/none
		SelectType=select/cons_tres
		SelectTypeParameters=CR_Core
		SchedulerType=sched/builtin
		SchedulerParameters=sched_interval=1,batch_sched_delay=0,requeue_delay=0
		PreemptType=preempt/partition_prio
		PreemptMode=REQUEUE
		PreemptParameters=send_user_signal
		ReturnToService=2
		SlurmdParameters=config_overrides
		StateSaveLocation=$folder/state
		SlurmdSpoolDir=$folder/spool/%n
		SlurmctldPidFile=$folder/run/slurmctld.pid
		SlurmdPidFile=$folder/run/%n.pid
		SlurmctldLogFile=$folder/log/slurmctld.log
		SlurmdLogFile=$folder/log/%n.log
		KillWait=30
		MinJobAge=3600
		InactiveLimit=0
		SlurmctldTimeout=30
		MessageTimeout=5
		TCPTimeout=2
		SlurmdTimeout=30
	CONF
	for ((node = 1; node <= num_nodes; node++)); do
		mkdir -p "$folder/spool/node$node"
		echo "NodeName=node$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + node))" \
			"CPUs=$cpus Boards=1 SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=1000"
	done >>"$SLURM_CONF"
	cat >>"$SLURM_CONF" <<-CONF
		PartitionName=low Nodes=ALL Default=YES State=UP OverSubscribe=NO PriorityTier=1 GraceTime=$grace_seconds
		PartitionName=high Nodes=ALL State=UP OverSubscribe=NO PriorityTier=10 PreemptMode=OFF
	CONF
}

# What client and daemon know each other by. Slurm's own auth/slurm would leave sockets in /run, one pair a machine.
start_munge() {
	munged --force --num-threads=2 --key-file="$folder/munge.key" --socket="$folder/run/munge.socket" \
		--seed-file="$folder/state/munge.seed" --log-file="$folder/log/munged.log" --pid-file="$folder/run/munged.pid" \
		2>>"$folder/log/munged.log"
}

start_node() {
	# shellcheck disable=SC2016  # the inner shell's variables
	unshare --mount --propagation private sh -c 'mount --bind "$1/hosts" /etc/hosts && exec slurmd -N "$2"' sh "$folder" "node$1"
}

wait_until_idle() {
	local attempt
	for attempt in {1..200}; do
		[[ $(sinfo --noheader --Node --states=idle --format=%N --partition=low 2>/dev/null | wc -l) -ne $num_nodes ]] || return 0
		sleep 0.1
	done
	echo "after $((attempt / 10)) s the nodes are not idle; see $folder/log" >&2
	return 1
}

# The daemons' own children end with their jobs: a slurmd with a job on it would not stop.
stop() {
	local attempt pid pids
	scancel --full --signal=KILL --user="$(id -un)" 2>/dev/null || true
	scancel --user="$(id -un)" 2>/dev/null || true
	for ((attempt = 0; attempt < 75; attempt++)); do
		[[ -n $(squeue --noheader 2>/dev/null) ]] || break
		sleep 0.2
	done
	mapfile -t pids < <(cat "$folder"/run/*.pid 2>/dev/null)
	for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
	for pid in "${pids[@]}"; do
		timeout 10 tail --pid="$pid" -f /dev/null || kill -KILL "$pid" 2>/dev/null || true
	done
}

case $command in
start)
	write_configuration
	start_munge
	slurmctld -c
	for ((number = 1; number <= num_nodes; number++)); do start_node "$number"; done
	wait_until_idle
	;;
start-node) start_node "${3:?the number of a node}" ;;
stop) stop ;;
*)
	echo "$command: start, start-node or stop" >&2
	exit 2
	;;
esac
