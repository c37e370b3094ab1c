"""The options of each command as a dataclass; ``main.py`` makes the command line of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DtypeName = Literal["float32", "bfloat16", "float16"]
KVDtypeName = Literal["fp8"]


@dataclass
class Generate:
    """Generate images with a supernet at any depth.

    Example: variant generate --model digits --labels 3 1 4 --depth 2 --out out/digits.png
    """

    model: str = "digits"
    """Model folder, Hub id, or a model of this package."""
    labels: tuple[str, ...] = ()
    """Classes by number or name; -1, or the number of classes, is the null class: unconditional.
    Default: every class, at most ten."""
    count: int = 1
    """Images per label."""
    depth: int | None = None
    """Layers in the flexible zone; default: every layer."""
    bridge: int | None = None
    """First scales that run every layer; default: the model's own."""
    schedule: str | None = None
    """In place of --depth: the layers of every scale, as a file that `variant search` wrote, or the
    depths by scale: 8x4-4-2."""
    all_depths: bool = False
    """Generate the same labels and seed at every depth of the model, side by side."""
    cfg: float = 1.5
    """Scale of classifier-free guidance; 0 turns it off and halves the work."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0: from all."""
    top_p: float = 0.96
    """Sample from the likeliest tokens with this total probability; 0: from all."""
    temperature: float = 1.0
    """Divides the logits: below 1 likelier tokens are preferred more."""
    more_smooth: bool = False
    """Mix the codes of likely tokens in place of taking one: smoother, as the original can."""
    seed: int = 0
    """Seed of the random draws: the same seed gives the same images."""
    device: str = "cpu"
    """Device of the model: cpu, cuda, cuda:1."""
    backend: str = "auto"
    """Backend of the kernels; auto: the fastest. `python -m variant_kernels` lists them."""
    dtype: DtypeName | None = None
    """Dtype of weights, K/V and matrix products; default: that of the weights."""
    kv_dtype: KVDtypeName | None = None
    """fp8 stores K and V in 8 bits with a scale per token and head; default: exact. `variant info
    --kv-dtype fp8` measures the error."""
    max_batch: int | None = None
    """Images per batch; default: as many as fit into free memory, at most 256."""
    out: Path = Path("out")
    """A .png file for a grid, or a folder for one file per image, written as soon as it is made."""
    resume: bool = False
    """Generate the images that an interrupted run with the same settings did not write to that
    folder."""
    overwrite: bool = False
    """Replace the images of an earlier run."""
    json: Path | None = None
    """File for settings, times and memory; -: print them in place of the table."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class Plan:
    """Print the memory of the K/V cache at every depth and bridge; needs no GPU and no weights.

    With --train: the memory of a training step on each GPU, and the fastest settings that fit.

    Example: variant plan --model var-d30 --batch 64 --memory 48

    Example: variant plan --train --model var-d30 --gpus 8 --memory 80
    """

    model: str = "var-d30"
    """A preset (var-d16, -d20, -d24, -d30, -d36-512), a model folder, "digits", or
    "fashion-mnist"."""
    batch: int | None = None
    """Number of images; guidance doubles the number of sequences; default: 64. With --train: images
    of a step on all GPUs; default: 1024."""
    dtype: DtypeName = "bfloat16"
    """Dtype of K, V and the weights; with --train of the matrix products."""
    kv_dtype: KVDtypeName | None = None
    """fp8: plan for 8-bit K and V with their scales, and print the measured error."""
    bridge: int | None = None
    """Bridge of the main table; default: the model's own."""
    schedule: str | None = None
    """Print the plan of this schedule too: a file that `variant search` wrote, or the depths by
    scale: 8x4-4-2."""
    memory: float | None = None
    """Device memory, GiB: print which depths and batches fit beside the weights; with --train, in
    how many parts a batch fits."""
    train: bool = False
    """Plan a training step in place of the K/V cache."""
    gpus: int = 1
    """Number of GPUs that train together; with --train."""
    page_size: int = 16
    """Tokens per page."""
    guidance: bool = True
    """Whether classifier-free guidance doubles the sequences."""
    json: Path | None = None
    """File for every plan, in bytes; -: print them in place of the tables."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class Train:
    """Train a transformer or a depth supernet by a recipe; Ctrl-C saves, --resume continues.

    --SECTION.KEY VALUE replaces any value of the recipe: --optim.learning-rate 2e-4.

    Example: variant train --recipe digits --out runs/digits
    """

    recipe: str = "digits"
    """Name of a packaged recipe, or a TOML file."""
    out: Path | None = None
    """Folder for checkpoints, metrics and the finished model; default: runs/RECIPE."""
    start_from: str | None = None
    """Model folder, Hub id, or a model of this package: train its transformer further, with its
    VQ-VAE; its sizes must be those of the recipe."""
    resume: bool = False
    """Continue from the last checkpoint in that folder."""
    seed: int | None = None
    """Overrides the recipe's seed."""
    overrides: tuple[str, ...] = ()
    """Values of single keys, as "optim.learning_rate=2e-4"; not an option by this name."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class TrainVae:
    """Train a multi-scale VQ-VAE by a recipe; Ctrl-C saves, --resume continues.

    --SECTION.KEY VALUE replaces any value of the recipe: --vae-training.epochs 20.

    Example: variant train-vae --recipe digits --out runs/digits
    """

    recipe: str = "digits"
    """Name of a packaged recipe, or a TOML file."""
    out: Path | None = None
    """Folder for checkpoints, metrics and the finished VQ-VAE; default: runs/RECIPE."""
    resume: bool = False
    """Continue from the last checkpoint in that folder."""
    seed: int | None = None
    """Overrides the recipe's seed."""
    overrides: tuple[str, ...] = ()
    """Values of single keys, as "optim.learning_rate=2e-4"; not an option by this name."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class Recipe:
    """Write, show or check a recipe of training.

    --SECTION.KEY VALUE replaces any value of the recipe: --optim.learning-rate 2e-4.

    Example: variant recipe new --data images --out my.toml

    Example: variant recipe show digits

    Example: variant recipe check my.toml
    """

    action: Literal["new", "show", "check"]
    """new: write a recipe for a folder of images or IDX files. show: print a recipe with every key
    and a comment for each. check: name every mistake, and print what the run will be."""
    recipe: str = ""
    """For show and check: name of a packaged recipe, or a TOML file."""
    data: Path | None = None
    """For new: a folder with sub-folders train and held_out, each with one sub-folder of images per
    class; with --split, a folder with one sub-folder per class; or a folder with the four IDX files
    of MNIST's names."""
    out: Path | None = None
    """For new: the file to write; default: standard output."""
    base: str | None = None
    """For new: a recipe whose sizes are taken; default: sizes by the number of images."""
    split: Path | None = None
    """For new: a new folder for links to the images of --data, one in ten of a class held out."""
    overrides: tuple[str, ...] = ()
    """Values of single keys, as "optim.learning_rate=2e-4"; not an option by this name."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class Tokenize:
    """Encode a recipe's images before training, as token shards; the same command continues.

    Under torchrun, every process writes its share of the shards. --SECTION.KEY VALUE replaces any
    value of the recipe: --data.mixup 0.2.

    Example: variant tokenize --recipe digits --data.copies 0 --passes 24 --out runs/digits/tokens
    """

    recipe: str = "digits"
    """Name of a packaged recipe, or a TOML file."""
    passes: int = 1
    """Passes over the training images, each augmented and mixed anew: as many as the epochs of
    training, or fewer, which then repeat."""
    out: Path | None = None
    """Folder for the shards; default: runs/RECIPE/tokens."""
    vae: Path | None = None
    """Folder that `variant train-vae` wrote into; default: runs/RECIPE. Not used where the recipe
    names the weights of a VQ-VAE."""
    seed: int | None = None
    """Overrides the recipe's seed."""
    overrides: tuple[str, ...] = ()
    """Values of single keys, as "optim.learning_rate=2e-4"; not an option by this name."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class Bench:
    """Time the engine beside the original VAR code or a plain-torch loop, and print its distance
    to the limit of the machine.

    Example: variant bench --model var-d16 --batch 1 --dtype bfloat16 --var-repo ../VAR
    """

    model: str = "digits"
    """Model folder, "digits", "fashion-mnist", or a preset (var-d16, ...) with random weights."""
    batch: tuple[int, ...] = (1, 8)
    """Images per batch; one or more sizes."""
    depths: tuple[int, ...] = ()
    """Layers in the flexible zone; default: every depth of the model."""
    dtype: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32",)
    """Dtype of the engine; one or more. Peers run in float32 and, where the processor has bfloat16
    products, under bfloat16 autocast; on a GPU under float16 autocast only."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of all models."""
    kv_dtype: KVDtypeName | None = None
    """fp8: also time the engine with 8-bit K/V, and count the tokens that change."""
    bridge: int | None = None
    """First scales that run every layer; default: the model's own."""
    cfg: float = 1.5
    """Scale of classifier-free guidance."""
    top_k: int = 900
    """Sample from the k likeliest tokens; 0: from all."""
    top_p: float = 0.96
    """Sample from the likeliest tokens with this total probability; 0: from all."""
    runs: int = 5
    """Rounds; each runs every implementation once."""
    var_repo: Path | None = None
    """Clone of FoundationVision/VAR to compare with; default: the plain-torch loop."""
    decoder: bool = False
    """Also time the decoder of the VQ-VAE on its own."""
    memory: bool = False
    """Measure the peak memory of each implementation in a process of its own."""
    threads: int | None = None
    """Number of threads; default: that of torch."""
    json: Path | None = None
    """File for the results, which benchmarks/report.py and benchmarks/compare.py read; -: print
    them in place of the tables."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class Convert:
    """Convert between files of the original VAR repository and a model folder, both ways; or from a
    checkpoint of a training run to either.

    --var and --vae, or --model, or a checkpoint are read; --out, or --to-var and --to-vae, are
    written. An input is never overwritten, and any other existing file only with --overwrite.
    `variant convert runs/mine --weights ema --out models/mine` takes a run's newest checkpoint.

    Example: variant convert --var var_d16.pth --vae vae_ch160v4096z32.pth --out models/var-d16

    Example: variant convert --model models/var-d16 --to-var exported/var.pth --to-vae
    exported/vae.pth
    """

    checkpoint: Path | None = None
    """Input in place of --var and --vae: a checkpoint of `variant train` (var-last.pt,
    var-step-00000040), or the run's folder for its newest one."""
    var: Path | None = None
    """Input: the transformer's .pth or .safetensors file, a trainer checkpoint, or a folder or Hub
    id of the original's Hub class."""
    vae: Path | None = None
    """Input: the VQ-VAE's file, or the same trainer checkpoint. Beside a checkpoint of a run: the
    VQ-VAE of the training, where it has moved."""
    model: str | None = None
    """Input in place of --var and --vae: a model folder, Hub id, or a model of this package."""
    out: Path | None = None
    """Output: a model folder."""
    to_var: Path | None = None
    """Output for the original VAR code: the transformer's .pth, .pt or .safetensors file."""
    to_vae: Path | None = None
    """Output for the original VAR code: the VQ-VAE's .pth, .pt or .safetensors file."""
    overwrite: bool = False
    """Overwrite existing outputs."""
    weights: str | None = None
    """Which weights of a file with several: model, ema (their moving average), or the name of an
    entry; default: the plain model, with a warning."""
    dtype: DtypeName | None = None
    """Dtype of the transformer's weights; default: unchanged."""
    num_heads: int | None = None
    """Attention heads; files of models without L2 norm do not hold it. This and the options below
    are for --var and --vae; default: what the files hold, else the original's value, with a
    warning."""
    patch_nums: tuple[int, ...] | None = None
    """Sides of the token maps; for files without lvl_1L."""
    norm_eps: float | None = None
    """Epsilon of the layer normalisations."""
    cond_drop_rate: float | None = None
    """Probability that training drops a label."""
    drop_path_rate: float | None = None
    """Stochastic depth of training."""
    quant_resi: float | None = None
    """Weight of the residual convolutions of the VQ-VAE."""
    using_znorm: bool | None = None
    """Whether the VQ-VAE finds the nearest code by cosine."""
    beta: float | None = None
    """Weight of the commitment loss of the VQ-VAE."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class Info:
    """Describe a model: sizes, subnets and their layers, how it was trained.

    Example: variant info --model digits

    Example: variant info --model digits --kv-dtype fp8
    """

    model: str = "digits"
    """Model folder, Hub id, or a model of this package."""
    kv_dtype: KVDtypeName | None = None
    """fp8: measure how 8-bit K/V change the logits and greedy tokens of this model at every depth
    (generates a few images; slow for a large model on a CPU)."""
    dtype: DtypeName | None = None
    """Dtype of weights and products in that measurement; default: that of the weights."""
    images: int = 4
    """Number of images in that measurement."""
    json: Path | None = None
    """File for the description; -: print it in place of the text."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class Sample:
    """Generate many images for an evaluation; the same command continues after any stop.

    Image i depends on the seed and on i alone, not on the batch, the processes or restarts (in 16
    bits the batch counts too). Under torchrun every process generates its share.

    Example: variant sample --model models/var-d30 --depth 16 --num 50000 --out samples.npz
    """

    model: str = "digits"
    """Model folder, Hub id, or a model of this package."""
    num: int | None = None
    """Number of images; default: 50 per class. The classes take turns."""
    labels: tuple[str, ...] = ()
    """Classes by number or name; -1 is the null class. Default: every class."""
    depth: int | None = None
    """Layers in the flexible zone; default: every layer."""
    bridge: int | None = None
    """First scales that run every layer; default: the model's own."""
    schedule: str | None = None
    """In place of --depth: the layers of every scale, as a file that `variant search` wrote, or the
    depths by scale: 8x4-4-2."""
    cfg: float = 1.5
    """Scale of classifier-free guidance; 0 turns it off and halves the work."""
    top_k: int = 900
    """Sample from the k likeliest tokens, at most those that there are; 0: from all."""
    top_p: float = 0.96
    """Sample from the likeliest tokens with this total probability; 0: from all."""
    seed: int = 0
    """Seed of the random draws."""
    device: str = "cpu"
    """Device of the model: cpu, cuda, cuda:1; under torchrun cuda is a GPU for each process."""
    backend: str = "auto"
    """Backend of the kernels; auto: the fastest."""
    dtype: DtypeName | None = None
    """Dtype of weights, K/V and matrix products; default: that of the weights."""
    kv_dtype: KVDtypeName | None = None
    """fp8 stores K and V in 8 bits with a scale per token and head; default: exact."""
    batch: int = 50
    """Images of a batch."""
    out: Path = Path("samples")
    """A folder, or an .npz file of uint8 images as the ADM evaluator reads."""
    format: Literal["png", "webdataset"] = "png"
    """Files in the folder: a PNG for each image, or .tar shards of 500."""
    json: Path | None = None
    """File for settings and counts; -: print them in place of the text."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class Eval:
    """Evaluate images: FID, sFID, Inception Score, precision, recall; or compare two results.

    Every number comes with its interval, its number of images and the distance of two real halves.

    Example: variant eval --images out --reference VIRTUAL_imagenet256_labeled.npz --weights
    weights-inception-2015-12-05-6726825d.pth

    Example: variant eval --images out --reference digits --features classifier:digits

    Example: variant eval --model digits --reference digits --features classifier:digits

    Example: variant eval --reconstruct digits --reference digits --features classifier:digits

    Example: variant eval --compare a.json b.json
    """

    images: Path | None = None
    """A folder of images, also in sub-folders; a .tar, or a folder of them; an .npz with arr_0."""
    reference: str | None = None
    """Images in the same forms; an .npz with mu and sigma; or a recipe, whose held-out images are
    taken."""
    features: str = "inception"
    """Network of the features. inception: that of 2015, which defines FID; dinov2: ViT-L/14, of
    FD-DINOv2; --weights names their file. classifier:RECIPE: one trained on the recipe's training
    images, now or before. MODULE:FUNCTION: a function of uint8 images (B, 3, Y, X) that returns
    features (B, D)."""
    weights: Path | None = None
    """File of the network's weights; a classifier is written there; default:
    runs/RECIPE/classifier.safetensors."""
    paired: bool = False
    """Image i belongs to image i of the reference, in the order of their names: PSNR, SSIM and the
    share of equal images too."""
    reconstruct: str | None = None
    """In place of --images: the reference's images, encoded and decoded by the VQ-VAE of this
    model, or of this folder of train-vae: rFID (named by the network), PSNR, SSIM."""
    scales: bool = False
    """With --reconstruct: PSNR of what is decoded from the first k scales too, for every k."""
    model: str | None = None
    """In place of --images: generate images with this model at several settings, and evaluate each;
    a model folder, Hub id, or a model of this package."""
    num: int | None = None
    """With --model: images of each setting; default: 50 per class."""
    depths: tuple[int, ...] = ()
    """With --model: layers in the flexible zone; default: every depth of the model."""
    bridges: tuple[int, ...] = ()
    """With --model: first scales that run every layer; default: the model's own."""
    schedules: tuple[str, ...] = ()
    """With --model: more settings, each with the layers of every scale: a file that `variant
    search` wrote, or the depths by scale, as 8x4-4-2. With --schedules and without --depths, these
    alone."""
    kv_dtypes: tuple[Literal["exact", "fp8"], ...] = ("exact",)
    """With --model: exact K and V, 8-bit ones, or both."""
    seed: int = 0
    """With --model: seed of the images, the same at every setting."""
    out: Path = Path("runs/eval")
    """With --model: folder of the images; the same command continues."""
    plot: Path | None = None
    """With --model: a picture of quality against memory and against time; needs matplotlib."""
    device: str = "cpu"
    """Device of the network and the model: cpu, cuda, cuda:1."""
    batch: int = 64
    """Images of a batch; it changes no metric."""
    compare: tuple[Path, ...] = ()
    """Two files that --json wrote: print both, and every setting that differs."""
    json: Path | None = None
    """File for the metrics and all that they depend on; -: print them in place of the table."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class Search:
    """Search the layers of every scale under a budget, without training.

    Layers are chosen by block influence and held-out loss; schedules by held-out loss, exactly
    where they are few. The schedule is a file for generate, sample, eval, plan and train.

    Example: variant search --model digits --budget kv=0.5

    Example: variant search --model models/var-d30 --data images/held_out --budget work=0.6
    """

    model: str = "digits"
    """Model folder, Hub id, a model of this package; or a file of the original's transformer, with
    --vae."""
    vae: str | None = None
    """The VQ-VAE's file, beside a file as --model."""
    data: str | None = None
    """Images whose loss counts: a recipe, whose held-out images are taken; a folder with one
    sub-folder of images per class; a folder of token shards; a folder or a file of IDX images, as
    MNIST has. Default for the models digits and fashion-mnist: their own data."""
    images: int = 256
    """Number of held-out images at most; half of them choose, half compare."""
    budget: tuple[str, ...] = ("kv=0.5",)
    """Shares of the full network's costs, all to be kept: kv=0.5 (peak K/V bytes), work=0.5 (FLOP
    of layers and head), latency=0.6 (times measured on this machine)."""
    depths: tuple[int, ...] = ()
    """Numbers of layers that a scale may run; default: every one up to 8 layers, else those of the
    model and some between."""
    exact: int = 3000
    """Search exactly up to so many schedules, by beam above."""
    beam: int = 24
    """Prefixes that a beam keeps of each scale, for each cost."""
    batch: int = 1
    """Images at once in the measurement of times, for a budget of latency."""
    device: str = "cpu"
    """Device of the model: cpu, cuda, cuda:1."""
    out: Path = Path("runs/search")
    """Folder for the schedule, the record, the losses and the table of times."""
    resume: bool = False
    """Use the losses and times that an earlier search left in that folder."""
    plot: Path | None = None
    """A picture of loss against each cost; needs matplotlib."""
    json: Path | None = None
    """File for all that was found; -: print it in place of the tables."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class Warm:
    """Compile the GPU kernels of a model and time their block sizes, so that no request waits.

    Both are kept on disk, so Ctrl-C loses only the step that runs. On a CPU there is nothing to do.

    Example: variant warm --model digits --device cuda --batch 1 8
    """

    model: str = "digits"
    """Model folder, Hub id, or a model of this package."""
    batch: tuple[int, ...] = (1,)
    """Images per batch; one or more sizes."""
    depths: tuple[int, ...] = ()
    """Layers in the flexible zone; default: every depth of the model."""
    dtype: DtypeName | None = None
    """Dtype of weights, K/V and matrix products; default: that of the weights."""
    kv_dtype: KVDtypeName | None = None
    """fp8: for K and V in 8 bits; default: exact."""
    device: str = "cuda"
    """Device of the model: cuda, cuda:1, cpu."""
    backend: str = "auto"
    """Backend of the kernels; auto: the fastest. `python -m variant_kernels` lists them."""
    json: Path | None = None
    """File for the steps and their seconds; -: print them in place of the lines."""
    debug: bool = False
    """Show the traceback of an error."""


Command = (
    Generate
    | Plan
    | Train
    | TrainVae
    | Recipe
    | Bench
    | Convert
    | Info
    | Tokenize
    | Sample
    | Eval
    | Search
    | Warm
)
