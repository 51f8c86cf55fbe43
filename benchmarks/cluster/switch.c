/* A switch between emulated hosts.

   usage: switch HOSTS PREFIX RATE_MBIT DELAY_US

   Makes a TUN device `em0` in each network namespace PREFIX0, PREFIX1, ... and passes IPv4 packets
   between them; host i owns 10.77.0.(i+1). A packet leaves DELAY_US after it came, later when the
   port of its receiver is busy. The rate of senders is the kernel's business (tbf on em0), so that
   TCP feels the back-pressure and nothing is dropped. Prints `ready`; ends on SIGTERM or when its
   parent dies. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { MOST_HOSTS = 32, LARGEST = 1 << 16, READS_AT_ONCE = 64 };

typedef struct { int64_t due_ns; int length; unsigned char bytes[]; } Packet;

/* Packets under way from one host to another, in order of their times. */
typedef struct { Packet **slots; unsigned first, last, capacity; } Queue;

static Queue queues[MOST_HOSTS][MOST_HOSTS];
static int devices[MOST_HOSTS], hosts;
static int64_t port_free_ns[MOST_HOSTS], delay_ns;
static double ns_per_byte;
static volatile sig_atomic_t stopped;

static void stop(int signal) { (void)signal; stopped = 1; }

static int fail(const char *what) { perror(what); return 1; }

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void append(Queue *queue, Packet *packet) {
  if (queue->last - queue->first == queue->capacity) {
    unsigned count = queue->last - queue->first, capacity = count ? 2 * count : 256;
    Packet **slots = malloc(capacity * sizeof *slots);
    for (unsigned i = 0; i < count; i++) slots[i] = queue->slots[(queue->first + i) % queue->capacity];
    free(queue->slots);
    *queue = (Queue){slots, 0, count, capacity};
  }
  queue->slots[queue->last++ % queue->capacity] = packet;
}

static int open_device(int host, const char *prefix) {
  char path[128];
  snprintf(path, sizeof path, "/run/netns/%s%d", prefix, host);
  int space = open(path, O_RDONLY);
  if (space < 0 || setns(space, CLONE_NEWNET)) return fail(path);
  close(space);
  devices[host] = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
  struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
  strcpy(request.ifr_name, "em0");
  if (devices[host] < 0 || ioctl(devices[host], TUNSETIFF, &request)) return fail("/dev/net/tun");
  return 0;
}

/* Cut-through: an idle port adds nothing to what the sender's equal link has cost, a busy one queues. */
static void take(int from, const unsigned char *bytes, int length) {
  if (length < 20 || bytes[0] >> 4 != 4 || bytes[16] != 10 || bytes[17] != 77) return;
  int to = bytes[19] - 1;
  if (to < 0 || to >= hosts) return;
  int64_t out = now_ns(), serial = (int64_t)(length * ns_per_byte);
  int64_t start = port_free_ns[to] > out - serial ? port_free_ns[to] : out - serial;
  port_free_ns[to] = start + serial;
  if (port_free_ns[to] > out) out = port_free_ns[to];
  Packet *packet = malloc(sizeof *packet + length);
  packet->due_ns = out + delay_ns;
  packet->length = length;
  memcpy(packet->bytes, bytes, length);
  append(&queues[from][to], packet);
}

/* Sends what is due; returns when the next packet is, 0 for none. */
static int64_t deliver(void) {
  int64_t next = 0;
  for (int from = 0; from < hosts; from++)
    for (int to = 0; to < hosts; to++) {
      Queue *queue = &queues[from][to];
      while (queue->first != queue->last) {
        Packet *packet = queue->slots[queue->first % queue->capacity];
        if (packet->due_ns > now_ns() + 2000) {
          if (!next || packet->due_ns < next) next = packet->due_ns;
          break;
        }
        if (write(devices[to], packet->bytes, packet->length) < 0) { /* TCP sends it again */ }
        free(packet);
        queue->first++;
      }
    }
  return next;
}

int main(int count, char **words) {
  if (count != 5 || (hosts = atoi(words[1])) < 1 || hosts > MOST_HOSTS) {
    fprintf(stderr, "usage: switch HOSTS PREFIX RATE_MBIT DELAY_US\n");
    return 2;
  }
  ns_per_byte = atof(words[3]) > 0 ? 8000 / atof(words[3]) : 0;
  delay_ns = (int64_t)(atof(words[4]) * 1000);
  for (int i = 0; i < hosts; i++)
    if (open_device(i, words[2])) return 1;
  prctl(PR_SET_TIMERSLACK, 1UL);
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  struct sched_param realtime = {.sched_priority = 10};
  if (sched_setscheduler(0, SCHED_FIFO, &realtime) && nice(-20) == -1) { /* as it is */ }
  signal(SIGTERM, stop);
  signal(SIGINT, SIG_IGN); /* the parent tells when */
  int poll = epoll_create1(0), timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
  struct epoll_event event = {.events = EPOLLIN, .data.u32 = MOST_HOSTS};
  epoll_ctl(poll, EPOLL_CTL_ADD, timer, &event);
  for (int i = 0; i < hosts; i++) {
    event.data.u32 = i;
    epoll_ctl(poll, EPOLL_CTL_ADD, devices[i], &event);
  }
  printf("ready\n");
  fflush(stdout);
  static unsigned char bytes[LARGEST];
  while (!stopped) {
    struct epoll_event events[MOST_HOSTS + 1];
    int found = epoll_wait(poll, events, MOST_HOSTS + 1, -1);
    for (int i = 0; i < found; i++) {
      int host = events[i].data.u32, length;
      uint64_t ticks;
      if (host == MOST_HOSTS) { if (read(timer, &ticks, sizeof ticks) < 0) { /* raced */ } continue; }
      for (int k = 0; k < READS_AT_ONCE && (length = read(devices[host], bytes, LARGEST)) > 0; k++)
        take(host, bytes, length);
    }
    int64_t next = deliver();
    struct itimerspec alarm = {.it_value = {next / 1000000000LL, next % 1000000000LL}};
    timerfd_settime(timer, TFD_TIMER_ABSTIME, &alarm, NULL);
  }
  return 0;
}
