"""The words of README.md; every number in them comes from the scans."""

HEAD = """# Four models, scanned

```
python reports/studies/first-road/fetch_smollm2.py models/SmolLM2-135M-Instruct
python reports/scans/fetch_minilm.py models/all-MiniLM-L6-v2
python reports/scans/quantise.py models/all-MiniLM-L6-v2
OMP_NUM_THREADS=1 python reports/scans/make.py demo ../shared/models/stories260K models/all-MiniLM-L6-v2 \
models/SmolLM2-135M-Instruct
```

`make.py` scans with the defaults (built-in calibration text, 32 windows of 512 tokens, tau 13) and `--nulls`, and
writes `results.json` and this page; without arguments it writes the page from the scans that are here. No number below
is typed.

## More outliers, heavier tail?

If blocks with more outliers had heavier tails, LOD and alpha would go opposite ways: Spearman's rho below 0 in the
first column, which is the claim as it is made; the other three show what it hangs on. p is two-sided, from all orders
of the blocks up to 8 and from 99,999 seeded ones beyond.

{table}

The claim has support in one model of four, the only one with blocks enough to decide. There the correlation is
moderate, holds without the two blocks that stand out in LOD, is stronger with the weights' own outliers and weaker with
PL_Alpha_Hill; and these weights are dequantised 4-bit values. The encoder points the other way with a larger
coefficient, short of what 6 blocks need. The first column says nothing about the demo and stories260K: a handful of
blocks would need a rho near 1, and it changes from one summary of alpha to the next. The demo's small p with
PL_Alpha_Hill is the smallest of many tests on it, none corrected for that. Neighbouring blocks may resemble each other,
which makes the p of independent orders too small.

Nor is there much in a block's mean alpha to go along with anything. The share of the variance of alpha's ranks (all
matrices in the blocks) that goes with the role and with the block, each with the other taken out, corrected for the
number of groups:

{shares}

A good part of alpha goes with what a matrix does; what the blocks differ by on average is in no model more than chance
would make (within a role there is structure along the depth, see the heatmaps: it cancels in the mean). **Neither a law
nor a refutation: LOD and alpha give different tables, the one by mean alpha ranks differences about as large as those
of chance on models of this size, and which table helps training is a question for training runs.**
"""

READINGS = {
    "demo": """The packaged Llama of {blocks} blocks: alpha from {alpha_least:.2f} to {alpha_most:.2f} (median \
{alpha_median:.2f}; {alpha_2_to_6} of {matrices} matrices in the blocks between 2 and 6). Role matters more than \
depth: `{heaviest_role_role}` has the heaviest tails (median {heaviest_role_alpha:.2f}), `{lightest_role_role}` the \
lightest ({lightest_role_alpha:.2f}). LOD runs from {lod_least_lod:.4f} % (block {lod_least_block}) to \
{lod_most_lod:.3f} % (block {lod_most_block}, {times_second:.1f} times the second); the weights alone reach \
{lod_weight_most:.4f} %, so the outliers come from the activations. No matrix passes for noise ({tested} tested), but \
the bootstrap interval of alpha is {interval_width:.1f} wide in the median matrix, a power law fits {badly_fitted} of \
{tested} badly, and {moved_by_xmin} exponents move by more than 1 between equally good xmin: a ranking of blocks by \
mean alpha rests on a few light-tailed matrices.""",
    "stories260K": """A published fp32 decoder of {blocks} blocks whose matrices are tiny: the smallest side is \
{smallest_side}, and a tail of a dozen eigenvalues decides alpha. It runs from {alpha_least:.2f} to {alpha_most:.2f} \
(median {alpha_median:.2f}, interval {interval_width:.1f} wide in the median matrix). LOD is highest in the first \
two blocks, from \
{lod_most_lod:.3f} % (block {lod_most_block}) to {lod_least_lod:.3f} % (block {lod_least_block}). {num_noise} of \
{tested} matrices cannot be told from noise, all value projections: {noise_names}; the alphas of \
{like_noise_2_to_6} of \
them lie between 2 and 6 all the same, which is what small matrices do by chance. With 5 blocks a table of gamma 5 \
draws \
everything.""",
    "all-MiniLM-L6-v2": """A sentence encoder of {blocks} blocks, fp32 and never quantised. Mean alpha rises with \
depth \
from {heaviest_block_alpha:.2f} (block {heaviest_block_block}) to {lightest_block_alpha:.2f} (block \
{lightest_block_block}): the first blocks are the heavy-tailed ones, and two value projections near the output are the \
lightest. Single matrices run from {alpha_least:.2f} to {alpha_most:.2f}, {alpha_2_to_6} of {matrices} between 2 \
and 6. \
LOD goes from {lod_least_lod:.4f} % (block {lod_least_block}) to {lod_most_lod:.4f} % (block {lod_most_block}), nearly \
flat but for the first block, and is lowest where the tails are heaviest: the opposite of the claim. {num_noise} of \
{tested} matrices cannot be told \
from noise by their largest eigenvalue: {noise_names}. {moved_by_xmin} exponents move by more than 1 between equally \
good xmin. The calibration text goes in as windows of {calibration_seq_len} tokens without the encoder's own special \
tokens.""",
    "SmolLM2-135M-Instruct": """A Llama of {blocks} blocks, from a Q4_1 file: **these are dequantised 4-bit weights \
written out in fp32**, so `dtype` says float32 and no alpha here is the original model's (below: how much such \
rounding \
moves a scan). Alpha runs from {alpha_least:.2f} to {alpha_most:.2f} (median {alpha_median:.2f}; {alpha_2_to_6} of \
{matrices} between 2 and 6), block means from {heaviest_block_alpha:.2f} (block {heaviest_block_block}) to \
{lightest_block_alpha:.2f} (block {lightest_block_block}). Again role matters more than depth: median \
{heaviest_role_alpha:.2f} for `{heaviest_role_role}`, {lightest_role_alpha:.2f} for `{lightest_role_role}`, whose \
spectra hardly have a tail. LOD is low and even, from {lod_least_lod:.3f} % (block {lod_least_block}), but for the \
last \
block with {lod_most_lod:.3f} % and the first with {lod_second_lod:.3f} %; a table of rule lod with gamma 5 draws \
block \
{lod_most_block} in every period. {num_noise} of {tested} matrices cannot be told from noise, all value projections, \
{flatter_than_noise} of them flatter than noise: {noise_names}. A power law fits {badly_fitted} badly, and \
{moved_by_xmin} exponents move by more than 1 between equally good xmin.""",
}

TAIL = """## What 4-bit rounding does to a scan

{model} is at hand unquantised; its {matrices} matrices inside the blocks went through Q4_1 and back, and were scanned
again (`quantise.py`, `quantisation.json`).

| | |
| --- | --- |
| alpha moved by, median and most | {alpha_moved_median:.3f}, {alpha_moved_most:.2f} |
| alpha moved by, mean with sign | {alpha_signed_mean:+.3f} |
| lambda_max moved by, median and most | {lambda_max_moved_median:.2%}, {lambda_max_moved_most:.1%} |
| Spearman, alpha of the matrices before with after | {spearman_matrices_alpha:.3f} |
| Spearman over the blocks, alpha and LOD | {spearman_blocks_alpha:.2f}, {spearman_blocks_lod:.2f} |
| LOD of a block moved by at most | {lod_moved_most:.1%} |
| LOD with mean alpha, before and after | {lod_with_alpha_before:+.2f}, {lod_with_alpha_after:+.2f} |

On this model the leading eigenvalue hardly moves, the order of the blocks by either measure stays, and single alphas
move by far less than their bootstrap intervals are wide. Whether that carries over to SmolLM2 cannot be measured here.
"""
