/* The state machines of client/secagg.py against a server that lies, explored exhaustively.
 *
 * N sites, the last C of which help the server; H = N - C are honest. A set of sites is a bit mask. In
 * each attempt the server asks every honest site, or not, with whatever sets it likes; a site that finds
 * a check failed stops. Asked at the end: can what was given, signed and masked break a promise?
 *
 *   1  never both kinds of share for one id, by honest sites           (never_both)
 *   2  never two survivor sets of one U1 with t signatures             (one_set)
 *   3  never a mask used twice, never an update uploaded twice         (once)
 *   4  never a sum over fewer than MINC - C honest sites               (group)
 *   5  an honest server gets the exact sum or none  (-DHONEST)         (exact)
 *
 * Sites do not talk to each other, what one is asked later only gains from what others have already done,
 * and another attempt's keys are others. So it loses nothing to run exchange by exchange and attempt by
 * attempt, and in each to ask the sites in order of id, each with every request that passes. Not asking a
 * site to share, to sign or to unmask only leaves the server with less; not asking it to mask is a choice.
 *
 * What is abstract: cryptography is perfect. A sealed share opens if sender and receiver saw the same U1
 * (`view`: its members, and which of two advertisements the colluder had in it). Colluders hold every
 * share that was dealt, and sign anything.
 *
 * -DSIGN_TWICE, -DNO_SIGNATURES, -DLOW_THRESHOLD, -DSMALL_COHORT, -DNO_CONSUMED, -DFORGET_DROPPED each
 * take one rule out, to see that the model can fail.
 */

#ifndef N
#define N 5
#endif
#ifndef C
#define C 1
#endif
#define H (N - C)
#ifndef ATTEMPTS
#define ATTEMPTS 2
#endif

#ifdef SMALL_COHORT
#define MINC 2
#else
#if C == 0
#define MINC 3
#else
#define MINC (3 * C + 1)
#endif
#endif

#if C == 0
#define PROMISED 3
#else
#define PROMISED (2 * C + 1)
#endif

#ifdef NO_CONSUMED
#define FRESH(site) true
#else
#define FRESH(site) (!consumed[site])
#endif

#ifdef NO_SIGNATURES
#define UNSIGNED true
#else
#define UNSIGNED false
#endif

#ifdef SIGN_TWICE
#define TWICE true
#else
#define TWICE false
#endif

#ifdef LOW_THRESHOLD
#define T(n) ((n) / 2)
#else
#define T(n) (((n) + (n) / 3) / 2 + 1)
#endif

#define ALL ((1 << N) - 1)
#define HAS(set, site) (((set) >> (site)) & 1)
#define ONE(site) (1 << (site))
#define SIZE5(s) (HAS(s,0) + HAS(s,1) + HAS(s,2) + HAS(s,3) + HAS(s,4))
#define SIZE(s) SIZE5(s)
#define MAX(a, b) ((a) > (b) -> (a) : (b))
#define NEEDED(n) MAX(T(n), MINC)
#define COLLUDERS (ALL & ~(ONE(H) - 1))

#ifndef HONEST

/* Any set that passes as the next one for `site`, by choice; there is at least one */
inline any_passing(site, from, least) {
  set = 0;
  do
  :: set < from -> set++
  :: HAS(set, site) && (set & ~from) == 0 && SIZE(set) >= least -> break
  od;
  skip
}

mtype = { IDLE, SHARED, MASKED, SIGNED };

mtype stage[H] = IDLE;
byte u1[H], u2[H], u3[H], twin[H]; /* twin: which of the colluder's two advertisements was in U1 */
byte other[H];                     /* a second survivor set that was signed: only under SIGN_TWICE */
bit consumed[H];                   /* the current update was uploaded */
byte uploads[H];                   /* how often, this update */
byte masks[H];                     /* how often this attempt's masks were used */
byte b_given[H], s_given[H];       /* by owner: honest givers */
byte attempt, i, j, k, set, needed, votes, mine, group, grown;
byte everyone = ALL;

#define SAME_VIEW(a, b) (u1[a] == u1[b] && twin[a] == twin[b])
#define DEALT_TO(owner, site) (HAS(u1[site], owner) && \
  (owner >= H || (stage[owner % H] != IDLE && SAME_VIEW(owner % H, site))))
#define SAME_SETS(a, b) (SAME_VIEW(a, b) && u2[a] == u2[b] && u3[a] == u3[b])

#define ALSO_SIGNED(a, b) (SAME_VIEW(a, b) && u2[a] == u2[b] && other[a] == u3[b])

/* Signatures that exist on the sets of `site`: colluders in U3 sign whatever helps */
inline count_votes(site, result) {
  d_step {
    result = SIZE(u3[site] & COLLUDERS);
    j = 0;
    do
    :: j < H ->
       if
       :: stage[j] == SIGNED && SAME_SETS(site, j) -> result++
       :: stage[j] == SIGNED && !SAME_SETS(site, j) && ALSO_SIGNED(j, site) -> result++
       :: else -> skip
       fi;
       j++
    :: else -> break
    od;
    j = 0
  }
}

/* Exchanges 0 and 1: advertise and share, with any U1 that passes */
inline share(site) {
  needed = MINC;
  any_passing(site, everyone, needed);
  u1[site] = set;
  if
  :: C > 0 && HAS(set, N - 1) -> twin[site] = 1
  :: true -> twin[site] = 0
  fi;
  stage[site] = SHARED;
  set = 0
}

/* Exchange 2: mask, with any U2 that passes and enough shares that open */
inline mask(site) {
  needed = NEEDED(SIZE(u1[site]));
  any_passing(site, u1[site], needed);
  d_step {
    votes = 0;
    j = 0;
    do
    :: j < N ->
       if
       :: HAS(set, j) && (j == site || DEALT_TO(j, site)) -> votes++
       :: else -> skip
       fi;
       j++
    :: else -> break
    od;
    j = 0
  }
  if
  :: votes >= T(SIZE(u1[site])) && FRESH(site) ->
     u2[site] = set;
     consumed[site] = 1;
     uploads[site]++;
     masks[site]++;
     stage[site] = MASKED
  :: else -> skip /* stopped, but its shares are dealt */
  fi;
  set = 0;
  votes = 0;
once:
  assert(uploads[site] <= 1 && masks[site] <= 1)
}

/* Exchange 3: sign any U3 that passes, once */
inline consist(site) {
  needed = NEEDED(SIZE(u1[site]));
  any_passing(site, u2[site], needed);
  u3[site] = set;
  stage[site] = SIGNED;
  if
  :: TWICE ->
     any_passing(site, u2[site], needed);
     other[site] = set
  :: else -> skip
  fi;
  set = 0
}

/* Exchange 4: with t signatures on its own sets, give one kind of share for each id */
inline unmask(site) {
  count_votes(site, votes);
  if
  :: UNSIGNED || votes >= T(SIZE(u1[site])) ->
     d_step {
       j = 0;
       do
       :: j < H ->
          if
          :: HAS(u2[site], j) && (j == site || DEALT_TO(j, site)) ->
             if
             :: HAS(u3[site], j) -> b_given[j] = b_given[j] | ONE(site)
             :: else -> s_given[j] = s_given[j] | ONE(site)
             fi
          :: else -> skip
          fi;
          j++
       :: else -> break
       od;
       j = 0
     }
  :: else -> skip
  fi;
  votes = 0
}

/* What the server can rebuild. The mask that site a put on for b stays unless s of one of them falls. It
 * goes out in a sum with b's vector if b put on the same one; if b did not, a's vector stays hidden. */
#define FALLS(given, owner) (stage[owner] != IDLE && SIZE(given[owner]) + C >= T(SIZE(u1[owner])))
#define UPLOADED(site) (masks[site] > 0)
#define MASKED_FOR(a, b) (HAS(u2[a], b) && !FALLS(s_given, a) && !FALLS(s_given, b))
#define JOINED(a, b) (MASKED_FOR(a, b) && UPLOADED(b) && SAME_VIEW(a, b) && HAS(u2[b], a))
#define HIDDEN_BY(a, b) (MASKED_FOR(a, b) && !JOINED(a, b))

inline judge() {
  i = 0;
  do
  :: i < H ->
never_both:
     assert(!(b_given[i] && s_given[i]));
     if
     :: stage[i] == SIGNED ->
        count_votes(i, mine);
        k = i + 1;
        do
        :: k < H ->
           if
           :: stage[k] == SIGNED && SAME_VIEW(i, k) && !SAME_SETS(i, k) ->
              count_votes(k, votes);
one_set:
              assert(!(mine >= T(SIZE(u1[i])) && votes >= T(SIZE(u1[k]))));
              votes = 0
           :: else -> skip
           fi;
           k++
        :: else -> break
        od;
        k = 0;
        mine = 0
     :: else -> skip
     fi;
     if
     :: UPLOADED(i) -> /* the group that unbroken pair masks tie to site i */
        d_step {
          group = ONE(i);
          grown = 1;
          do
          :: grown ->
             grown = 0;
             k = 0;
             do
             :: k < H ->
                j = 0;
                do
                :: j < H ->
                   if
                   :: HAS(group, k) && !HAS(group, j) && JOINED(k, j) ->
                      group = group | ONE(j);
                      grown = 1
                   :: else -> skip
                   fi;
                   j++
                :: else -> break
                od;
                k++
             :: else -> break
             od
          :: else -> break
          od;
          votes = 0; /* masks on the group that do not fall */
          j = 0;
          do
          :: j < H ->
             if
             :: HAS(group, j) && !FALLS(b_given, j) -> votes++
             :: else -> skip
             fi;
             k = 0;
             do
             :: k < H ->
                if
                :: HAS(group, j) && k != j && HIDDEN_BY(j, k) -> votes++
                :: else -> skip
                fi;
                k++
             :: else -> break
             od;
             j++
          :: else -> break
          od;
          j = 0;
          k = 0
        }
group_size:
        assert(votes > 0 || SIZE(group) >= PROMISED);
        votes = 0;
        group = 0
     :: else -> skip
     fi;
     i++
  :: else -> break
  od;
  i = 0
}

#define FOR_EACH(condition, action, or_not) \
  i = 0; \
  do \
  :: i < H -> \
     if \
     :: condition -> action \
     :: or_not || !(condition) -> skip \
     fi; \
     i++ \
  :: else -> break \
  od; \
  i = 0

active proctype server() {
  do
  :: attempt < ATTEMPTS ->
     atomic { FOR_EACH(consumed[i], consumed[i] = 0; uploads[i] = 0, true) }; /* trained anew, or not */
     atomic { FOR_EACH(true, share(i), false) };
     atomic { FOR_EACH(stage[i] == SHARED, mask(i), true) };
     atomic { FOR_EACH(stage[i] == MASKED, consist(i), false) };
     atomic { FOR_EACH(stage[i] == SIGNED, unmask(i), false) };
     atomic { judge() };
     d_step { /* the next attempt has other keys; only what was consumed is left */
       i = 0;
       do
       :: i < H ->
          stage[i] = IDLE;
          u1[i] = 0; u2[i] = 0; u3[i] = 0; twin[i] = 0;
          other[i] = 0;
          masks[i] = 0; b_given[i] = 0; s_given[i] = 0;
          i++
       :: else -> break
       od;
       i = 0;
       attempt++
     }
  :: else -> break
  od
}

#else /* HONEST: sites drop out when they like, the server follows the protocol */

#ifdef FORGET_DROPPED
#define REMEMBERS false
#else
#define REMEMBERS true
#endif
#define X(site) ONE(site)
#define B(site) (1000 + 37 * (site))
#define P(a, b) (5000 + 211 * ((a) < (b) -> (a) : (b)) + 17 * ((a) < (b) -> (b) : (a)))

inline any_subset(result, from) {
  result = 0;
  k = 0;
  do
  :: k < N ->
     if
     :: HAS(from, k) -> result = result | ONE(k)
     :: true -> skip
     fi;
     k++
  :: else -> break
  od;
  k = 0
}

byte u1, u2, u3, u4, u5, i, j, k;
int total, plain;
bool done;

active proctype server() {
  any_subset(u1, ALL);
  if
  :: SIZE(u1) < MINC -> goto abort
  :: else -> any_subset(u2, u1)
  fi;
  if
  :: SIZE(u2) < NEEDED(SIZE(u1)) -> goto abort
  :: else -> any_subset(u3, u2)
  fi;
  if
  :: SIZE(u3) < NEEDED(SIZE(u1)) -> goto abort
  :: else -> any_subset(u4, u3)
  fi;
  if
  :: SIZE(u4) < T(SIZE(u1)) -> goto abort
  :: else -> any_subset(u5, u4)
  fi;
  if
  :: SIZE(u5) < T(SIZE(u1)) -> goto abort
  :: else -> skip
  fi;
  d_step {
    i = 0;
    do
    :: i < N ->
       if
       :: HAS(u3, i) ->
          plain = plain + X(i);
          total = total + X(i) + B(i);
          j = 0;
          do
          :: j < N ->
             if
             :: HAS(u2, j) && j < i -> total = total + P(i, j)
             :: HAS(u2, j) && j > i -> total = total - P(i, j)
             :: else -> skip
             fi;
             j++
          :: else -> break
          od
       :: else -> skip
       fi;
       i++
    :: else -> break
    od;
    i = 0;
    do
    :: i < N -> /* t sites of U5 give shares: b of U3, s of U2 without U3 */
       if
       :: HAS(u3, i) -> total = total - B(i)
       :: HAS(u2 & ~u3, i) && REMEMBERS ->
          j = 0;
          do
          :: j < N ->
             if
             :: HAS(u3, j) && i < j -> total = total - P(i, j)
             :: HAS(u3, j) && i > j -> total = total + P(i, j)
             :: else -> skip
             fi;
             j++
          :: else -> break
          od
       :: else -> skip
       fi;
       i++
    :: else -> break
    od;
    i = 0;
    j = 0
  }
exact:
  assert(total == plain && SIZE(u3) >= MINC);
  done = true;
abort:
  assert(done || total == 0)
}

#endif
