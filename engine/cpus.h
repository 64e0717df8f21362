/* cpus.h - how many CPUs this process may use. */
#ifndef ENGINE_CPUS_H
#define ENGINE_CPUS_H

/* The smaller of the affinity mask and the cgroup's quota (v2 cpu.max up the tree, v1
 * cpu.cfs_quota_us), rounded up, at least 1. */
int cpus_available(void);

/* The same with the file system's root elsewhere, for tests: reads ROOT/proc/self/cgroup and
 * below ROOT/sys/fs/cgroup.  0 if no quota is set. */
int cpus_quota(const char *root);

#endif
